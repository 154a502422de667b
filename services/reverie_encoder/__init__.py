"""The encoder service: captions in, references to text embeddings out."""
