"""The sampler service: draws pictures with a resident transformer, and adapters that come and go."""
