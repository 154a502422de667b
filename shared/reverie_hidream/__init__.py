"""HiDream-I1: checkpoints, text encoders, VAE, transformer, LoKr adapters and the flow-matching maths.

Everything here computes with torch; nothing here speaks gRPC or knows about jobs.
"""
