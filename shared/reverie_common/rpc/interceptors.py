"""What happens around every RPC of a server: metrics, access log, errors, readiness, from the outside in.

Everything that must see a refusal is outside the thing that refuses.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from grpc_status import rpc_status

from reverie_common.errors import InternalError, ReverieError, UnavailableError
from reverie_common.rpc.status import error_from_rpc, status_from_error
from reverie_common.telemetry import metrics
from reverie_common.telemetry.logs import request_id

logger = logging.getLogger(__name__)

# grpc's classes are generic in their stubs only, so the parameters must stay text at run time.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behaviour = Callable[[Any, Any], Any]

REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_CHARACTERS = 128

# Probes and browsing ask all the time; they are served before the model is loaded and logged at debug.
INFRASTRUCTURE_PREFIXES = ("grpc.health.", "grpc.reflection.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The RPC that is being served."""

    service: str
    """Full name, for instance `reverie.encoder.v1.EncoderService`."""

    method: str
    """Name without the service."""

    kind: str
    """`unary`, `client_stream`, `server_stream` or `bidi_stream`, as the well-known metrics call them."""

    request_id: str
    """From the metadata of the call; empty if the caller gave none."""

    @property
    def is_infrastructure(self) -> bool:
        """Whether this is health or reflection, not one of our services."""
        return self.service.startswith(INFRASTRUCTURE_PREFIXES)

    @property
    def labels(self) -> tuple[str, str, str]:
        """Values of metrics.GRPC_LABELS."""
        return self.kind, self.service, self.method


class AroundInterceptor(grpc.aio.ServerInterceptor):
    """Puts an async context manager around every RPC, of all four kinds."""

    def around(self, call: Call, context: Context) -> AbstractAsyncContextManager[None]:
        """What is entered before the handler begins and left when it has ended; here, nothing."""
        del call, context
        return nullcontext()

    def received(self, call: Call) -> None:
        """A message came in."""

    def sent(self, call: Call) -> None:
        """A message went out."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Called by gRPC for each RPC."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        call = _call_of(handler, handler_call_details)
        return _rewrap(handler, self._wrap(call, handler))

    def _wrap(self, call: Call, handler: Handler) -> Behaviour:
        behaviour = _behaviour_of(handler)

        async def serve_unary_response(request: Any, context: Context) -> Any:
            async with self.around(call, context):
                response = await behaviour(self._count_received(call, request, handler), context)
                self.sent(call)
                return response

        async def serve_stream_response(request: Any, context: Context) -> None:
            async with self.around(call, context):
                responses = behaviour(
                    self._count_received(call, request, handler), CountingContext(context, self, call)
                )
                if not hasattr(responses, "__aiter__"):
                    await responses
                    return
                async with aclosing(responses):
                    async for response in responses:
                        await context.write(response)
                        self.sent(call)

        return serve_stream_response if handler.response_streaming else serve_unary_response

    def _count_received(self, call: Call, request: Any, handler: Handler) -> Any:
        if handler.request_streaming:
            return self._count_stream(call, request)
        self.received(call)
        return request

    async def _count_stream(self, call: Call, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            self.received(call)
            yield request


class CountingContext:
    """A servicer context that counts the messages of handlers that write instead of yielding."""

    def __init__(self, context: Context, interceptor: AroundInterceptor, call: Call) -> None:
        self._context = context
        self._interceptor = interceptor
        self._call = call

    async def write(self, message: Any) -> None:
        """Send one message."""
        await self._context.write(message)
        self._interceptor.sent(self._call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class MetricsInterceptor(AroundInterceptor):
    """Counts and times RPCs under the names of go-grpc-prometheus."""

    @asynccontextmanager
    async def around(self, call: Call, context: Context) -> AsyncIterator[None]:
        """See AroundInterceptor."""
        metrics.GRPC_STARTED.labels(*call.labels).inc()
        begin = time.perf_counter()
        with metrics.GRPC_IN_FLIGHT.track_inprogress():
            try:
                yield
            except asyncio.CancelledError:
                self._ended(call, "CANCELLED", begin)
                raise
            except BaseException:
                self._ended(call, code_name(context, failed=True), begin)
                raise
            self._ended(call, code_name(context, failed=False), begin)

    def _ended(self, call: Call, code: str, begin: float) -> None:
        metrics.GRPC_HANDLED.labels(*call.labels, code).inc()
        metrics.GRPC_SECONDS.labels(*call.labels).observe(time.perf_counter() - begin)

    def received(self, call: Call) -> None:
        """See AroundInterceptor."""
        metrics.GRPC_RECEIVED.labels(*call.labels).inc()

    def sent(self, call: Call) -> None:
        """See AroundInterceptor."""
        metrics.GRPC_SENT.labels(*call.labels).inc()


class AccessLogInterceptor(AroundInterceptor):
    """Writes one line for each RPC: request id, method, code, seconds."""

    @asynccontextmanager
    async def around(self, call: Call, context: Context) -> AsyncIterator[None]:
        """See AroundInterceptor."""
        begin = time.perf_counter()
        token = request_id.set(call.request_id or uuid.uuid4().hex)
        code = "CANCELLED"
        try:
            yield
            code = code_name(context, failed=False)
        except Exception:
            code = code_name(context, failed=True)
            raise
        finally:
            self._log(call, code, time.perf_counter() - begin)
            request_id.reset(token)

    def _log(self, call: Call, code: str, seconds: float) -> None:
        logger.log(
            logging.DEBUG if call.is_infrastructure else logging.INFO,
            "%s %s",
            call.method,
            code,
            extra={"method": f"{call.service}/{call.method}", "code": code, "seconds": round(seconds, 4)},
        )


class ErrorInterceptor(AroundInterceptor):
    """Ends failed RPCs with a google.rpc.Status; an error that nobody meant shows its trace in the log only."""

    @asynccontextmanager
    async def around(self, call: Call, context: Context) -> AsyncIterator[None]:
        """See AroundInterceptor."""
        try:
            yield
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            # The boundary: whatever a servicer did not foresee is a bug, and the process goes on serving others.
            known = known_error(error)
            if known is None:
                method = f"{call.service}/{call.method}"
                logger.exception("%s failed unexpectedly", call.method, extra={"method": method})
            await self._abort(context, known or _bug())

    async def _abort(self, context: Context, error: ReverieError) -> None:
        await context.abort_with_status(rpc_status.to_status(status_from_error(error)))


class ReadyInterceptor(AroundInterceptor):
    """Refuses RPCs until the service has loaded what it needs; health and reflection always answer."""

    def __init__(self) -> None:
        self.is_ready = False

    @asynccontextmanager
    async def around(self, call: Call, context: Context) -> AsyncIterator[None]:
        """See AroundInterceptor."""
        del context
        if not self.is_ready and not call.is_infrastructure:
            raise UnavailableError(
                f"{call.service} is still loading; try again in a few seconds",
                reason="STILL_LOADING",
                metadata={"service": call.service},
                retry_after_seconds=2.0,
            )
        yield


def known_error(error: BaseException) -> ReverieError | None:
    """The error that a servicer meant its caller to see; None for a bug."""
    if isinstance(error, ReverieError):
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        # A call that was made on behalf of this one and not translated: its cause is still the caller's to know.
        return error_from_rpc(error)
    if isinstance(error, BaseExceptionGroup):
        # A TaskGroup wraps what its tasks raised. One bug among them is a bug.
        causes = [known_error(cause) for cause in error.exceptions]
        return causes[0] if all(causes) else None
    return None


def code_name(context: Context, *, failed: bool) -> str:
    """Name of the status code that a call ended or will end with."""
    code = context.code()
    if isinstance(code, int):
        code = next((known for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.UNKNOWN)
    if code is None or (failed and code is grpc.StatusCode.OK):
        code = grpc.StatusCode.UNKNOWN if failed else grpc.StatusCode.OK
    return code.name


def _bug() -> InternalError:
    return InternalError(
        "internal error; the server's log has the details under this request id",
        metadata={"request_id": request_id.get()},
    )


def _call_of(handler: Handler, details: grpc.HandlerCallDetails) -> Call:
    service, _, method = details.method.lstrip("/").rpartition("/")
    kinds = {
        (False, False): "unary",
        (True, False): "client_stream",
        (False, True): "server_stream",
        (True, True): "bidi_stream",
    }
    kind = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    return Call(service=service, method=method, kind=kind, request_id=_request_id(details))


def _request_id(details: grpc.HandlerCallDetails) -> str:
    for key, value in details.invocation_metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and value:
            return value[:MAX_REQUEST_ID_CHARACTERS]
    return ""


def _behaviour_of(handler: Handler) -> Behaviour:
    behaviours = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return next(behaviour for behaviour in behaviours if behaviour is not None)


def _rewrap(handler: Handler, behaviour: Behaviour) -> Handler:
    makers: dict[tuple[bool, bool], Callable[..., Handler]] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(
        behaviour,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
