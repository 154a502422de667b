"""The one way in which a Reverie service listens, becomes ready, drains and stops.

A process calls `run_server`; a test enters a `Server`. Both have health, reflection, metrics, the access log and the
error mapping.
"""

import asyncio
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from reverie_common.errors import ReverieError
from reverie_common.ports import port_in_use, require_free_port
from reverie_common.process import log_fatal
from reverie_common.rpc.channel import KEEPALIVE_SECONDS, MAX_MESSAGE_BYTES
from reverie_common.rpc.interceptors import (
    AccessLogInterceptor,
    ErrorInterceptor,
    MetricsInterceptor,
    ReadyInterceptor,
)
from reverie_common.rpc.status import MAX_METADATA_BYTES
from reverie_common.settings import ServerSettings
from reverie_common.telemetry.metrics import MetricsServer, serve_metrics

logger = logging.getLogger(__name__)

Step = Callable[[], Awaitable[None]]

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedService:
    """One gRPC service and what answers it."""

    name: str
    """Full proto name, for instance `reverie.encoder.v1.EncoderService`."""

    add_to_server: Callable[[Any, grpc.aio.Server], None]
    """The generated `add_..._to_server`."""

    servicer: Any
    """An instance of the generated servicer class with async methods."""


class Server:
    """A listening server. As an async context manager it is serving inside the block and has drained after it."""

    def __init__(
        self,
        services: Sequence[ServedService],
        settings: ServerSettings,
        *,
        load: Step | None = None,
        begin_drain: Step | None = None,
        stop: Step | None = None,
    ) -> None:
        """Listens to nothing yet.

        Args:
            services: what is served.
            settings: where and how.
            load: what has to happen before calls are accepted, for instance loading weights.
            begin_drain: what has to happen first when the service stops, while calls are still answered, for instance
                waiting for those whom it told to finish.
            stop: what has to happen after the last call, for instance flushing a queue.
        """
        self.port = 0
        self.metrics_port = 0
        self._services = tuple(services)
        self._settings = settings
        self._load = load
        self._begin_drain = begin_drain
        self._stop = stop
        self._health = health.aio.HealthServicer()
        self._ready = ReadyInterceptor()
        self._server: grpc.aio.Server | None = None
        self._metrics: MetricsServer | None = None
        self._drained = False

    @property
    def target(self) -> str:
        """`host:port` to connect to."""
        return f"{self._settings.host}:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        try:
            await self.load()
        except BaseException:
            await self.drain()
            raise
        await self.serving()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.drain()

    async def start(self) -> None:
        """Listen. Health answers NOT_SERVING, and calls are refused with UNAVAILABLE, until `serving`.

        Raises:
            FailedPreconditionError: a port is in use.
        """
        self._metrics = serve_metrics(
            self._settings.host, self._settings.metrics_port, service=self._services[0].name.split(".")[1]
        )
        self.metrics_port = self._metrics.port
        try:
            self._server = await self._make_server()
            self.port = self._bind(self._server)
            await self._server.start()
        except BaseException:
            await asyncio.to_thread(self._metrics.close)
            raise

    async def _make_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[MetricsInterceptor(), AccessLogInterceptor(), ErrorInterceptor(), self._ready],
            options=_options(self._settings),
        )
        for service in self._services:
            service.add_to_server(service.servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._set_health(_NOT_SERVING)
        if self._settings.reflection:
            names = [service.name for service in self._services]
            reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        return server

    def _bind(self, server: grpc.aio.Server) -> int:
        host, port = self._settings.host, self._settings.port
        # gRPC itself would write a second, cryptic line to stderr.
        require_free_port(host, port, "--port")
        try:
            return server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise port_in_use(host, port, "--port", str(error)) from error

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", *(service.name for service in self._services)):
            await self._health.set(name, status)

    async def load(self) -> None:
        """Run the load step, if there is one."""
        if self._load is not None:
            await self._load()

    async def serving(self) -> None:
        """Accept calls and say so: health, then the ready file."""
        self._ready.is_ready = True
        await self._set_health(_SERVING)
        if self._settings.ready_file is not None:
            ports = {"pid": os.getpid(), "port": self.port, "metrics_port": self.metrics_port}
            await asyncio.to_thread(_write_atomically, self._settings.ready_file, json.dumps(ports))
        logger.info(
            "serving on %s",
            self.target,
            extra={"port": self.port, "metrics_port": self.metrics_port},
        )

    async def drain(self) -> None:
        """Stop without dropping work, in the one order that does.

        Health says NOT_SERVING while calls still succeed, so that balancers turn away; after drain_seconds new calls
        are refused; calls in flight have grace_seconds to end; then the stop step runs. A second time, nothing happens.
        """
        if self._drained:
            return
        self._drained = True
        await self._health.enter_graceful_shutdown()
        if self._settings.ready_file is not None:
            self._settings.ready_file.unlink(missing_ok=True)
        if self._begin_drain is not None:
            await self._begin_drain()
        if self._ready.is_ready:
            await asyncio.sleep(self._settings.drain_seconds)
        try:
            if self._server is not None:
                await self._server.stop(self._settings.grace_seconds)
            if self._stop is not None:
                await self._stop()
        finally:
            if self._metrics is not None:
                await asyncio.to_thread(self._metrics.close)


async def run_server(
    services: Sequence[ServedService],
    settings: ServerSettings,
    *,
    load: Step | None = None,
    stop: Step | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. The body of a service's `__main__`, under asyncio.run.

    A ReverieError while starting or loading is one log line and exit status 1. A second signal ends the process at
    once.

    Raises:
        SystemExit: status 1 if the service could not start.
    """
    await run(Server(services, settings, load=load, stop=stop))


async def run(server: Server) -> None:
    """Do as `run_server` with a server that the caller made, because its steps need the port, for instance."""
    ended = _signalled()
    try:
        await server.start()
    except ReverieError as error:
        log_fatal(error)
        raise SystemExit(1) from None
    try:
        await _serve_until(server, ended)
    except ReverieError as error:
        log_fatal(error)
        raise SystemExit(1) from None
    finally:
        logger.info("draining")
        await server.drain()
        logger.info("stopped")


async def _serve_until(server: Server, ended: asyncio.Event) -> None:
    loading = asyncio.create_task(server.load())
    waiting = asyncio.create_task(ended.wait())
    try:
        await asyncio.wait({loading, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading
            await server.serving()
            await waiting
    finally:
        loading.cancel()
        waiting.cancel()
        await asyncio.gather(loading, waiting, return_exceptions=True)


def _signalled() -> asyncio.Event:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if ended.is_set():
            logger.warning("second signal: ending without draining")
            os._exit(128 + number)
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return ended


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _options(settings: ServerSettings) -> list[tuple[str, int]]:
    options = {
        "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
        "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
        "grpc.max_metadata_size": MAX_METADATA_BYTES,
        "grpc.absolute_max_metadata_size": MAX_METADATA_BYTES,
        # Two processes on one port would share its calls by chance; refuse instead.
        "grpc.so_reuseport": 0,
        # Our clients ping; without this the server answers with GOAWAY too_many_pings.
        "grpc.http2.min_ping_interval_without_data_ms": KEEPALIVE_SECONDS * 1000 // 2,
        "grpc.keepalive_permit_without_calls": 1,
    }
    if settings.max_connection_age_seconds:
        options["grpc.max_connection_age_ms"] = int(settings.max_connection_age_seconds * 1000)
        options["grpc.max_connection_age_grace_ms"] = int(settings.grace_seconds * 1000)
    return list(options.items())
