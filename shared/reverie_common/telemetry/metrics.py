"""Prometheus metrics of a process, and the port that serves them.

A process has one registry. Each service declares its own instruments once, in its metrics.py, with
`registry=REGISTRY`; the ones that every process has are here. Labels come from closed sets, never an id.
"""

import platform
from dataclasses import dataclass
from functools import partial
from http.server import ThreadingHTTPServer
from importlib import metadata
from threading import Thread

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, MetricsHandler
from prometheus_client.process_collector import ProcessCollector

from reverie_common.ports import port_in_use

# The instruments of a process are one, like its memory; passing them through every constructor would only hide that.
# Not prometheus_client's own registry, which libraries fill with what we do not want.
REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

LATENCY_BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
STOP_POLL_SECONDS = 0.05
GRPC_LABELS = ("grpc_type", "grpc_service", "grpc_method")

BUILD_INFO = Info("reverie_build", "Version and Python of this process.", registry=REGISTRY)

GRPC_STARTED = Counter("grpc_server_started_total", "RPCs begun.", GRPC_LABELS, registry=REGISTRY)
GRPC_HANDLED = Counter("grpc_server_handled_total", "RPCs ended.", (*GRPC_LABELS, "grpc_code"), registry=REGISTRY)
GRPC_RECEIVED = Counter("grpc_server_msg_received_total", "Messages received.", GRPC_LABELS, registry=REGISTRY)
GRPC_SENT = Counter("grpc_server_msg_sent_total", "Messages sent.", GRPC_LABELS, registry=REGISTRY)
GRPC_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Seconds from the start of an RPC to its end.",
    GRPC_LABELS,
    buckets=LATENCY_BUCKETS_SECONDS,
    registry=REGISTRY,
)
GRPC_IN_FLIGHT = Gauge("reverie_rpcs_in_flight", "RPCs begun and not ended.", registry=REGISTRY)

STORE_SECONDS = Histogram(
    "reverie_store_operation_seconds",
    "Seconds of one attempt of an object store operation, failed ones included.",
    ("op",),
    buckets=LATENCY_BUCKETS_SECONDS,
    registry=REGISTRY,
)
STORE_BYTES = Counter("reverie_store_bytes", "Bytes of objects read and written.", ("op",), registry=REGISTRY)

for _op in ("get", "create", "replace", "head", "list", "delete"):
    STORE_SECONDS.labels(_op)
for _op in ("get", "create", "replace"):
    STORE_BYTES.labels(_op)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsServer:
    """A running /metrics page."""

    port: int
    """The port that it listens on."""

    server: ThreadingHTTPServer
    thread: Thread

    def close(self) -> None:
        """Stop serving and free the port. Blocks for at most STOP_POLL_SECONDS."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def serve_metrics(host: str, port: int, *, service: str) -> MetricsServer:
    """Serve REGISTRY at http://host:port/metrics from a thread of its own; port 0 takes any free one.

    Raises:
        FailedPreconditionError: the port is in use.
    """
    BUILD_INFO.info({"service": service, "version": version(), "python": platform.python_version()})
    try:
        server = ThreadingHTTPServer((host, port), MetricsHandler.factory(REGISTRY))
    except OSError as error:
        raise port_in_use(host, port, "--metrics-port", str(error.strerror or error)) from error
    # prometheus_client's own start_http_server looks every half second whether it has to stop, which delays each stop.
    serve = partial(server.serve_forever, poll_interval=STOP_POLL_SECONDS)
    thread = Thread(target=serve, name="metrics", daemon=True)
    thread.start()
    return MetricsServer(port=server.server_port, server=server, thread=thread)


def version() -> str:
    """The version of Reverie that is installed."""
    return metadata.version("reverie")
