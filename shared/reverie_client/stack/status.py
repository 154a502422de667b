"""What a stack's services are doing, for `reverie status`."""

import http.client
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from reverie_client.stack.options import SERVICES
from reverie_client.stack.state import ServiceRecord, StateDirectory

TIMEOUT_SECONDS = 2.0
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
"""A HealthCheckResponse that says SERVING. The message is one field; its package is not a dependency of the client."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceStatus:
    """One service."""

    name: str
    health: str
    """`serving`, `not serving`, `not answering`, `dead` or `stopped`."""
    pid: int | None = None
    address: str | None = None
    metrics_port: int | None = None
    uptime_seconds: float | None = None
    memory_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def read_status(state_dir: Path) -> list[ServiceStatus]:
    """Ask every service that a state directory's record names; those that were never started are `stopped`."""
    records = StateDirectory(path=state_dir.absolute()).load()
    return [_status(name, records.get(name)) for name in SERVICES]


def _status(name: str, record: ServiceRecord | None) -> ServiceStatus:
    if record is None:
        return ServiceStatus(name=name, health="stopped")
    if not record.process.is_alive:
        return ServiceStatus(name=name, health="dead", pid=record.pid, address=record.address)
    return ServiceStatus(
        name=name,
        health=_store_health(record.address) if name == "store" else _health(record.address),
        pid=record.pid,
        address=record.address,
        metrics_port=record.metrics_port or None,
        uptime_seconds=round(record.process.uptime_seconds, 1),
        memory_bytes=record.process.memory_bytes,
    )


def _health(address: str) -> str:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(HEALTH_METHOD)
        try:
            answer = check(b"", timeout=TIMEOUT_SECONDS)
        except grpc.RpcError:
            return "not answering"
    return "serving" if answer == SERVING else "not serving"


def _store_health(address: str) -> str:
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return "not answering"
    finally:
        connection.close()
    return "serving"
