"""gRPC, once for every process: the server bootstrap, the channel, and how errors cross between them.

Import the modules themselves: a client needs `channel` and neither pydantic nor prometheus_client.
"""
