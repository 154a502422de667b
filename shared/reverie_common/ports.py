"""Ports to listen on: choosing free ones, and refusing taken ones with a clear error."""

import socket
from contextlib import ExitStack

from reverie_common.errors import FailedPreconditionError

LOOPBACK = "127.0.0.1"


def free_ports(count: int, *, first: int = 0) -> list[int]:
    """Choose free loopback ports, all different; the first one is `first` if that is not 0."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count - bool(first))]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        ports = [int(each.getsockname()[1]) for each in sockets]
    return [first, *ports] if first else ports


def require_free_port(host: str, port: int, flag: str) -> None:
    """Refuse a port on which something listens already, or an address that is not of this machine; 0 is always free.

    Raises:
        FailedPreconditionError: naming host, port and the flag that chooses another one.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As servers do: connections of a server that has just ended do not occupy the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise port_in_use(host, port, flag, str(error.strerror or error)) from error


def port_in_use(host: str, port: int, flag: str, cause: str) -> FailedPreconditionError:
    """The error for a port that cannot be listened on."""
    return FailedPreconditionError(
        f"cannot listen on {host}:{port} ({cause}): stop what listens there, or choose another {flag}",
        reason="PORT_IN_USE",
        metadata={"host": host, "port": str(port), "flag": flag},
    )
