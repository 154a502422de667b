"""Ports to listen on: choosing free ones, and refusing taken ones with a clear error."""

import os
import socket
from itertools import count, islice

from reverie_common.errors import FailedPreconditionError

LOOPBACK = "127.0.0.1"

# Below the range from which Linux takes the local ports of outgoing connections (32768 and up): a port chosen there may
# be somebody's connection before its server listens on it.
CHOSEN_PORTS = range(12_000, 32_000)

# A process does not choose a port again: what it chose before may not be listened on yet. Where it begins depends
# on its number, so that processes which choose at the same moment do not meet.
_turns = count(os.getpid() * 101)


def free_ports(number: int, *, first: int = 0) -> list[int]:
    """Choose free loopback ports, all different; the first one is `first` if that is not 0.

    Raises:
        FailedPreconditionError: there are not as many.
    """
    wanted = number - bool(first)
    turns = islice(_turns, len(CHOSEN_PORTS))
    candidates = (CHOSEN_PORTS[turn % len(CHOSEN_PORTS)] for turn in turns)
    ports = list(islice((port for port in candidates if port != first and _is_free(port)), wanted))
    if len(ports) < wanted:
        raise FailedPreconditionError(
            f"only {len(ports)} of {wanted} ports are free between {CHOSEN_PORTS.start} and {CHOSEN_PORTS.stop}: stop "
            "what listens there, or name the ports yourself",
            reason="NO_FREE_PORT",
        )
    return [first, *ports] if first else ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


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
