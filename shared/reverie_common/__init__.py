"""What every Reverie process shares, and nothing about models: errors, settings, storage, gRPC, logs and metrics.

Nothing here imports torch, and nothing at this level imports a third-party package, so that a client that only needs
the errors or a channel pays for nothing else.
"""
