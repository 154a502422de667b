"""What callers and workers of the trainer ask: the servicers, and what they share."""
