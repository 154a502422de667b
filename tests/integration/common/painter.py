"""A gRPC service that does what it is asked to, in all four kinds of RPC; also a program, for tests of whole processes.

Messages are bytes. A request `b"raise:NAME"` raises the error of that name, `b"bug"` fails as a bug would, `b"sleep:S"`
takes that many seconds, and everything else is answered with itself.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from pydantic_settings import SettingsConfigDict
from reverie_common import errors
from reverie_common.process import run_process
from reverie_common.rpc.server import ServedService, run_server
from reverie_common.settings import ServerSettings
from reverie_common.telemetry.logs import configure_logging

SERVICE = "reverie.painter.v1.PainterService"
VIOLATION = errors.FieldViolation(field="canvas.width", description="0 is below 1")


class PainterSettings(ServerSettings):
    """Settings of the painter."""

    model_config = SettingsConfigDict(env_prefix="REVERIE_PAINTER_")

    load_seconds: float = 0.0
    """How long loading takes."""

    missing: Path | None = None
    """A file whose absence makes loading fail."""

    broken: bool = False
    """Loading fails as a bug would."""


class Painter:
    """Answers every kind of RPC."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.begun = asyncio.Event()
        self.finished = asyncio.Event()

    async def unary(self, request: bytes, context: Any) -> bytes:
        """One in, one out."""
        return await self._answer(request, context)

    async def server_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """One in, itself twice out, by yielding."""
        yield await self._answer(request, context)
        yield request

    async def written_stream(self, request: bytes, context: Any) -> None:
        """One in, itself twice out, by writing."""
        await context.write(await self._answer(request, context))
        await context.write(request)

    async def client_stream(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        """Many in, all of them out in one."""
        return b",".join([await self._answer(request, context) async for request in requests])

    async def bidi_stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Many in, many out."""
        async for request in requests:
            yield await self._answer(request, context)

    async def _answer(self, request: bytes, context: Any) -> bytes:
        text = request.decode()
        if text == "bug":
            raise KeyError("the painter forgot something private")
        if text == "abort":
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "said by hand")
        if text.startswith("raise:"):
            raise make_error(text.removeprefix("raise:"))
        if text.startswith("sleep:"):
            await self._sleep(float(text.removeprefix("sleep:")))
        return request

    async def _sleep(self, seconds: float) -> None:
        self.begun.set()
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        self.finished.set()


def make_error(name: str) -> errors.ReverieError:
    """An error of the class of that name, with everything that an error can carry."""
    error_class: type[errors.ReverieError] = getattr(errors, name)
    return error_class(
        f"the painter refuses: {name}",
        reason=f"PAINTER_{error_class.default_reason}",
        metadata={"brush": "round"},
        violations=[VIOLATION],
        retry_after_seconds=1.25,
    )


def add_painter(servicer: Painter, server: grpc.aio.Server) -> None:
    """What generated code does for a service of a proto."""
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(servicer.unary),
        "ServerStream": grpc.unary_stream_rpc_method_handler(servicer.server_stream),
        "WrittenStream": grpc.unary_stream_rpc_method_handler(servicer.written_stream),
        "ClientStream": grpc.stream_unary_rpc_method_handler(servicer.client_stream),
        "BidiStream": grpc.stream_stream_rpc_method_handler(servicer.bidi_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def served(painter: Painter) -> ServedService:
    """The painter as a service."""
    return ServedService(name=SERVICE, add_to_server=add_painter, servicer=painter)


async def serve() -> None:
    """The body of the process."""
    settings = PainterSettings.from_command_line()
    configure_logging("painter", settings.log_format, level=settings.log_level)

    async def load() -> None:
        await asyncio.sleep(settings.load_seconds)
        if settings.broken:
            raise KeyError("a bug while loading")
        if settings.missing is not None and not settings.missing.exists():
            raise errors.NotFoundError(
                f"checkpoint part {settings.missing} is missing: download it again",
                reason="CHECKPOINT_PART_MISSING",
                metadata={"part": str(settings.missing)},
            )

    async def stop() -> None:
        configure_logging("painter-stopping", settings.log_format)
        await asyncio.sleep(0)

    await run_server([served(Painter())], settings, load=load, stop=stop)


if __name__ == "__main__":
    run_process(serve)
