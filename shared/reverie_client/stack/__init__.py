"""The whole of Reverie on one machine: an S3 server and four services as child processes, on loopback.

`reverie up`, the demo and the tests use `Stack`. Needs the extra `standalone`. Linux only: processes are told apart by
what /proc says about them.
"""

from reverie_client.stack.options import SERVICES, StackOptions
from reverie_client.stack.stack import DeadService, Stack
from reverie_client.stack.status import ServiceStatus, read_status

__all__ = ["SERVICES", "DeadService", "ServiceStatus", "Stack", "StackOptions", "read_status"]
