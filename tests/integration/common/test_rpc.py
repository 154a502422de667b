"""What every RPC of every service gets: typed errors with details, metrics, an access log, limits, readiness."""

import asyncio
import io
import json
import urllib.request
from collections.abc import AsyncIterator, Callable
from types import ModuleType
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from reverie_common import errors
from reverie_common.errors import FailedPreconditionError, ReverieError, UnavailableError
from reverie_common.rpc.channel import (
    MAX_MESSAGE_BYTES,
    connect,
    remaining_seconds,
    repeat_while_unavailable,
    translated,
)
from reverie_common.rpc.server import Server
from reverie_common.rpc.status import code_of
from reverie_common.settings import ServerSettings
from reverie_common.telemetry.logs import configure_logging
from reverie_common.telemetry.metrics import REGISTRY

SERVICE = "reverie.painter.v1.PainterService"
KINDS = {
    "Unary": "unary",
    "ServerStream": "server_stream",
    "ClientStream": "client_stream",
    "BidiStream": "bidi_stream",
}
# Generous: the machine may be busy, and nothing waits this long when it works.
TIMEOUT_SECONDS = 30

# Platform table D11: a domain error and the code that a caller sees.
ERROR_CODES = {
    "InvalidArgumentError": grpc.StatusCode.INVALID_ARGUMENT,
    "NotFoundError": grpc.StatusCode.NOT_FOUND,
    "ObjectNotFoundError": grpc.StatusCode.NOT_FOUND,
    "AlreadyExistsError": grpc.StatusCode.ALREADY_EXISTS,
    "FailedPreconditionError": grpc.StatusCode.FAILED_PRECONDITION,
    "AbortedError": grpc.StatusCode.ABORTED,
    "ResourceExhaustedError": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "StoreFullError": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "UnavailableError": grpc.StatusCode.UNAVAILABLE,
    "StoreUnavailableError": grpc.StatusCode.UNAVAILABLE,
    "DeadlineExceededError": grpc.StatusCode.DEADLINE_EXCEEDED,
    "UnauthenticatedError": grpc.StatusCode.UNAUTHENTICATED,
    "PermissionDeniedError": grpc.StatusCode.PERMISSION_DENIED,
    "StoreAccessError": grpc.StatusCode.PERMISSION_DENIED,
    "DataLossError": grpc.StatusCode.DATA_LOSS,
    "IntegrityError": grpc.StatusCode.DATA_LOSS,
    "InternalError": grpc.StatusCode.INTERNAL,
}


@pytest.fixture
def servicer(painter: ModuleType) -> Any:
    """What serves the calls."""
    return painter.Painter()


@pytest.fixture
async def server(painter: ModuleType, servicer: Any) -> AsyncIterator[Server]:
    """A serving server."""
    async with Server([painter.served(servicer)], ServerSettings(grace_seconds=1.0)) as server:
        yield server


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to it that repeats nothing."""
    async with connect(server.target, retries=False) as channel:
        yield channel


async def call(
    channel: grpc.aio.Channel, method: str, *requests: bytes, request_id: str = "", limit_seconds: float = 30
) -> list[bytes]:
    """Make a call of any kind; gives all answers."""
    make: Any = {
        "Unary": channel.unary_unary,
        "ClientStream": channel.stream_unary,
        "BidiStream": channel.stream_stream,
    }.get(method, channel.unary_stream)
    metadata = [("x-request-id", request_id)] if request_id else None
    sent = iter(requests) if method in ("ClientStream", "BidiStream") else requests[0]
    answers = make(f"/{SERVICE}/{method}")(sent, timeout=limit_seconds, metadata=metadata)
    if method in ("Unary", "ClientStream"):
        return [await answers]
    return [answer async for answer in answers]


@pytest.mark.parametrize(
    ("method", "answers"),
    [
        ("Unary", [b"a"]),
        ("ServerStream", [b"a", b"a"]),
        ("WrittenStream", [b"a", b"a"]),
        ("ClientStream", [b"a,b"]),
        ("BidiStream", [b"a", b"b"]),
    ],
)
async def test_every_kind_of_call_is_served(channel: grpc.aio.Channel, method: str, answers: list[bytes]) -> None:
    assert await call(channel, method, b"a", b"b") == answers


@pytest.mark.parametrize(("name", "code"), ERROR_CODES.items())
async def test_an_error_has_its_code_and_all_details(
    channel: grpc.aio.Channel, name: str, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, "Unary", b"raise:" + name.encode())
    status = rpc_status.from_call(caught.value)
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    assert caught.value.code() is code
    assert [detail.Unpack(into) for detail, into in zip(status.details, (info, bad_request, retry), strict=True)]
    assert (info.domain, info.reason) == ("reverie", f"PAINTER_{getattr(errors, name).default_reason}")
    assert dict(info.metadata) == {"brush": "round"}
    assert [(each.field, each.description) for each in bad_request.field_violations] == [
        ("canvas.width", "0 is below 1")
    ]
    assert retry.retry_delay.ToTimedelta().total_seconds() == 1.25


@pytest.mark.parametrize("name", ERROR_CODES)
async def test_a_caller_gets_the_error_that_was_raised(
    channel: grpc.aio.Channel, painter: ModuleType, name: str
) -> None:
    raised = painter.make_error(name)
    with pytest.raises(ReverieError) as caught, translated():
        await call(channel, "Unary", b"raise:" + name.encode())
    error = caught.value
    assert isinstance(raised, type(error))
    assert code_of(error) is code_of(raised)
    assert (error.message, error.reason, error.metadata) == (raised.message, raised.reason, raised.metadata)
    assert (error.violations, error.retry_after_seconds) == (raised.violations, 1.25)


@pytest.mark.parametrize("method", ["Unary", "ServerStream", "WrittenStream", "ClientStream", "BidiStream"])
async def test_errors_are_the_same_for_every_kind_of_call(channel: grpc.aio.Channel, method: str) -> None:
    with pytest.raises(errors.NotFoundError) as caught, translated():
        await call(channel, method, b"raise:NotFoundError")
    assert caught.value.reason == "PAINTER_NOT_FOUND"


@pytest.mark.parametrize("method", ["Unary", "ServerStream", "WrittenStream", "ClientStream", "BidiStream"])
async def test_a_bug_shows_its_trace_in_the_log_only(channel: grpc.aio.Channel, method: str) -> None:
    stream = io.StringIO()
    configure_logging("painter", stream=stream)
    with pytest.raises(errors.InternalError) as caught, translated():
        await call(channel, method, b"bug", request_id="r-7")
    assert "private" not in caught.value.message
    assert caught.value.metadata == {"request_id": "r-7"}
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines() if "trace" in json.loads(line)]
    assert "the painter forgot something private" in line["trace"]
    assert line["request_id"] == "r-7"


async def test_an_abort_by_hand_is_left_as_it_is(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, "Unary", b"abort")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.OUT_OF_RANGE, "said by hand")


async def test_hundreds_of_violations_arrive(painter: ModuleType) -> None:
    violations = [errors.FieldViolation(field=f"samples[{i}]", description="broken " * 10) for i in range(500)]

    class Strict(painter.Painter):  # type: ignore[misc,name-defined]  # the module is loaded at run time
        async def unary(self, request: bytes, context: Any) -> bytes:
            raise errors.InvalidArgumentError("all broken", violations=violations)

    async with Server([painter.served(Strict())], ServerSettings()) as server, connect(server.target) as channel:
        with pytest.raises(errors.InvalidArgumentError) as caught, translated():
            await call(channel, "Unary", b"")
    assert caught.value.violations == tuple(violations)


async def test_an_untranslated_error_of_another_service_keeps_its_meaning(
    painter: ModuleType, channel: grpc.aio.Channel
) -> None:
    class Gateway(painter.Painter):  # type: ignore[misc,name-defined]  # the module is loaded at run time
        async def unary(self, request: bytes, context: Any) -> bytes:
            return (await call(channel, "Unary", request))[0]

    async with Server([painter.served(Gateway())], ServerSettings()) as front, connect(front.target) as outer:
        with pytest.raises(errors.ResourceExhaustedError) as caught, translated():
            await call(outer, "Unary", b"raise:ResourceExhaustedError")
    assert caught.value.reason == "PAINTER_RESOURCE_EXHAUSTED"


async def fail_in_tasks(painter: ModuleType, *failures: Exception) -> ReverieError:
    """What a caller gets when the tasks of a servicer's TaskGroup fail."""

    async def fail(failure: Exception) -> None:
        raise failure

    class Parallel(painter.Painter):  # type: ignore[misc,name-defined]  # the module is loaded at run time
        async def unary(self, request: bytes, context: Any) -> bytes:
            async with asyncio.TaskGroup() as group:
                for failure in failures:
                    group.create_task(fail(failure))
            return request

    async with Server([painter.served(Parallel())], ServerSettings()) as server, connect(server.target) as channel:
        with pytest.raises(ReverieError) as caught, translated():
            await call(channel, "Unary", b"a")
    return caught.value


async def test_an_error_of_a_task_is_the_error_of_its_call(painter: ModuleType) -> None:
    assert isinstance(await fail_in_tasks(painter, errors.NotFoundError("gone")), errors.NotFoundError)


async def test_a_bug_among_the_errors_of_tasks_is_a_bug(painter: ModuleType) -> None:
    assert isinstance(await fail_in_tasks(painter, errors.NotFoundError("gone"), KeyError()), errors.InternalError)


async def test_a_server_that_is_gone_is_an_unavailable_error(free_port: Callable[[], int]) -> None:
    async with connect(f"127.0.0.1:{free_port()}", retries=False) as channel:
        with pytest.raises(UnavailableError), translated():
            await call(channel, "Unary", b"a")


async def test_a_passed_deadline_is_its_own_error(channel: grpc.aio.Channel) -> None:
    with pytest.raises(errors.DeadlineExceededError), translated():
        await call(channel, "Unary", b"sleep:30", limit_seconds=0.2)


async def test_an_unknown_method_is_an_error_with_its_code_as_reason(channel: grpc.aio.Channel) -> None:
    with pytest.raises(errors.InternalError) as caught, translated():
        await call(channel, "NoSuchMethod", b"")
    assert caught.value.reason == "UNIMPLEMENTED"


async def test_a_cancelled_call_is_cancelled_in_the_servicer(channel: grpc.aio.Channel, servicer: Any) -> None:
    task = asyncio.create_task(call(channel, "Unary", b"sleep:30"))
    await asyncio.wait_for(servicer.begun.wait(), TIMEOUT_SECONDS)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(servicer.cancelled.wait(), TIMEOUT_SECONDS)


async def test_a_silent_call_outlives_the_pings_of_its_caller(
    painter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reverie_common.rpc.server.KEEPALIVE_SECONDS", 1)
    options = {"grpc.keepalive_time_ms": 1000}
    async with (
        Server([painter.served(painter.Painter())], ServerSettings(grace_seconds=1.0)) as server,
        connect(server.target, retries=False, options=options) as channel,
    ):
        assert await call(channel, "Unary", b"sleep:7") == [b"sleep:7"]  # pings too often end it at the fourth


async def test_a_message_above_four_mebibytes_is_refused(channel: grpc.aio.Channel) -> None:
    with pytest.raises(errors.ResourceExhaustedError), translated():
        await call(channel, "Unary", bytes(MAX_MESSAGE_BYTES + 1))


async def test_a_message_just_below_four_mebibytes_is_taken(channel: grpc.aio.Channel) -> None:
    body = b"x" * (MAX_MESSAGE_BYTES - 100)
    assert await call(channel, "Unary", body) == [body]


def count(name: str, **labels: str) -> float:
    """Value of a metric for one method."""
    return REGISTRY.get_sample_value(name, {"grpc_service": SERVICE, **labels}) or 0.0


@pytest.mark.parametrize(("method", "kind"), KINDS.items())
@pytest.mark.parametrize(
    ("request_text", "code"), [(b"a", "OK"), (b"raise:AbortedError", "ABORTED"), (b"bug", "INTERNAL")]
)
async def test_every_call_is_counted_and_timed(
    channel: grpc.aio.Channel, method: str, kind: str, request_text: bytes, code: str
) -> None:
    labels = {"grpc_type": kind, "grpc_method": method}
    names = ("grpc_server_started_total", "grpc_server_handling_seconds_count", "grpc_server_msg_received_total")
    before = {name: count(name, **labels) for name in names}
    handled = count("grpc_server_handled_total", grpc_code=code, **labels)
    await asyncio.gather(call(channel, method, request_text), return_exceptions=True)
    await wait_until(lambda: count("grpc_server_handled_total", grpc_code=code, **labels) == handled + 1)
    assert {name: count(name, **labels) - before[name] for name in names} == dict.fromkeys(names, 1.0)


@pytest.mark.parametrize("method", ["ServerStream", "WrittenStream"])
async def test_messages_sent_are_counted(channel: grpc.aio.Channel, method: str) -> None:
    labels = {"grpc_type": "server_stream", "grpc_method": method}
    before = count("grpc_server_msg_sent_total", **labels)
    await call(channel, method, b"a")
    await wait_until(lambda: count("grpc_server_msg_sent_total", **labels) == before + 2)


async def test_a_cancelled_call_is_counted_as_cancelled(channel: grpc.aio.Channel, servicer: Any) -> None:
    labels = {"grpc_type": "unary", "grpc_method": "Unary", "grpc_code": "CANCELLED"}
    before = count("grpc_server_handled_total", **labels)
    with pytest.raises(grpc.aio.AioRpcError):
        await call(channel, "Unary", b"sleep:30", limit_seconds=0.2)
    await wait_until(lambda: count("grpc_server_handled_total", **labels) == before + 1)


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what the server does just after it has answered."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():  # noqa: ASYNC110  # metrics and logs have no event to wait for
            await asyncio.sleep(0.01)


async def test_every_call_is_one_line_of_the_access_log(channel: grpc.aio.Channel) -> None:
    stream = io.StringIO()
    configure_logging("painter", stream=stream)
    with pytest.raises(grpc.aio.AioRpcError):
        await call(channel, "Unary", b"raise:NotFoundError", request_id="r-1")
    await wait_until(lambda: "r-1" in stream.getvalue())
    line = json.loads(stream.getvalue())
    assert (line["method"], line["code"], line["request_id"]) == (f"{SERVICE}/Unary", "NOT_FOUND", "r-1")
    assert 0 <= line["seconds"] < TIMEOUT_SECONDS


async def test_a_call_without_a_request_id_gets_one(channel: grpc.aio.Channel) -> None:
    stream = io.StringIO()
    configure_logging("painter", stream=stream)
    await call(channel, "Unary", b"a")
    await wait_until(lambda: bool(stream.getvalue()))
    assert len(json.loads(stream.getvalue())["request_id"]) == 32


async def test_probes_are_not_in_the_access_log(channel: grpc.aio.Channel) -> None:
    stream = io.StringIO()
    configure_logging("painter", stream=stream)
    await health_of(channel)
    await call(channel, "Unary", b"a")
    await wait_until(lambda: "Unary" in stream.getvalue())
    assert "Check" not in stream.getvalue()


async def test_metrics_have_their_own_port(server: Server, channel: grpc.aio.Channel) -> None:
    await call(channel, "Unary", b"a")
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    text = (await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=30).read())).decode()
    assert 'reverie_build_info{python="3.' in text
    assert 'service="painter"' in text
    assert "grpc_server_handled_total{" in text
    assert 'reverie_store_operation_seconds_count{op="get"}' in text
    assert 'reverie_store_bytes_total{op="create"}' in text


async def health_of(channel: grpc.aio.Channel, service: str = SERVICE) -> int:
    """What the health service says."""
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_a_serving_server_says_so(channel: grpc.aio.Channel, service: str) -> None:
    assert await health_of(channel, service) == health_pb2.HealthCheckResponse.SERVING


async def test_health_of_an_unknown_service_is_not_found(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_of(channel, "reverie.unknown.v1.Unknown")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_can_be_watched(painter: ModuleType) -> None:
    server = Server([painter.served(painter.Painter())], ServerSettings())
    await server.start()
    async with connect(server.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        seen = [(await watch.read()).status]
        await server.serving()
        seen.append((await watch.read()).status)
        draining = asyncio.create_task(server.drain())
        seen.append((await watch.read()).status)
        watch.cancel()
        await draining
    assert seen == [
        health_pb2.HealthCheckResponse.NOT_SERVING,
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    ]


async def reflected_services(channel: grpc.aio.Channel) -> list[str]:
    """Names that reflection lists."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    return [service.name for service in answers[0].list_services_response.service]


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    assert SERVICE in await reflected_services(channel)


async def test_reflection_can_be_switched_off(painter: ModuleType) -> None:
    settings = ServerSettings(reflection=False)
    async with Server([painter.served(painter.Painter())], settings) as server, connect(server.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected_services(channel)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_calls_are_refused_until_the_service_has_loaded(painter: ModuleType) -> None:
    server = Server([painter.served(painter.Painter())], ServerSettings())
    await server.start()
    async with connect(server.target, retries=False) as channel:
        assert await health_of(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(UnavailableError) as caught, translated():
            await call(channel, "Unary", b"a")
        await server.serving()
        assert await call(channel, "Unary", b"a") == [b"a"]
    await server.drain()
    assert caught.value.reason == "STILL_LOADING"
    assert caught.value.retry_after_seconds


async def test_draining_serves_new_calls_while_health_says_no(painter: ModuleType) -> None:
    server = Server([painter.served(painter.Painter())], ServerSettings(drain_seconds=1.0, grace_seconds=5.0))
    await server.start()
    await server.serving()
    async with connect(server.target, retries=False) as channel:
        await call(channel, "Unary", b"connected")
        draining = asyncio.create_task(server.drain())
        await asyncio.sleep(0)
        assert await health_of(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await call(channel, "Unary", b"late") == [b"late"]
        await draining
        with pytest.raises(UnavailableError), translated():
            await call(channel, "Unary", b"too late")


async def test_a_call_in_flight_ends_before_the_stop_step(painter: ModuleType, servicer: Any) -> None:
    finished_before_stop: list[bool] = []

    async def stop() -> None:
        finished_before_stop.append(servicer.finished.is_set())

    server = Server([painter.served(servicer)], ServerSettings(grace_seconds=30.0), stop=stop)
    async with server, connect(server.target) as channel:
        task = asyncio.create_task(call(channel, "Unary", b"sleep:0.5"))
        await asyncio.wait_for(servicer.begun.wait(), TIMEOUT_SECONDS)
        await server.drain()
        assert await task == [b"sleep:0.5"]
    assert finished_before_stop == [True]


async def test_a_service_that_cannot_load_does_not_listen_on(painter: ModuleType) -> None:
    async def load() -> None:
        raise errors.NotFoundError("no weights")

    server = Server([painter.served(painter.Painter())], ServerSettings(), load=load)
    with pytest.raises(errors.NotFoundError):
        await server.__aenter__()
    async with connect(server.target, retries=False) as channel:
        with pytest.raises(UnavailableError), translated():
            await call(channel, "Unary", b"a")


@pytest.mark.parametrize("field", ["port", "metrics_port"])
async def test_a_port_in_use_is_named_with_the_remedy(server: Server, painter: ModuleType, field: str) -> None:
    taken = getattr(server, field)
    second = Server([painter.served(painter.Painter())], ServerSettings.model_validate({field: taken}))
    with pytest.raises(FailedPreconditionError) as caught:
        await second.start()
    assert caught.value.reason == "PORT_IN_USE"
    flag = f"--{field.replace('_', '-')}"
    assert caught.value.metadata == {"host": "127.0.0.1", "port": str(taken), "flag": flag}
    assert flag in caught.value.message


async def test_an_unavailable_call_is_repeated_by_policy(painter: ModuleType) -> None:
    failures = [b"1", b"2"]

    class Flaky(painter.Painter):  # type: ignore[misc,name-defined]  # the module is loaded at run time
        async def unary(self, request: bytes, context: Any) -> bytes:
            if failures:
                failures.pop()
                raise UnavailableError("not yet")
            return request

    async with Server([painter.served(Flaky())], ServerSettings()) as server, connect(server.target) as channel:
        assert await call(channel, "Unary", b"a") == [b"a"]
    assert failures == []


@pytest.mark.parametrize("name", ["InternalError", "ResourceExhaustedError", "AbortedError"])
async def test_other_errors_are_not_repeated(painter: ModuleType, name: str) -> None:
    calls: list[bytes] = []

    class Counting(painter.Painter):  # type: ignore[misc,name-defined]  # the module is loaded at run time
        async def unary(self, request: bytes, context: Any) -> bytes:
            calls.append(request)
            raise painter.make_error(name)

    async with Server([painter.served(Counting())], ServerSettings()) as server, connect(server.target) as channel:
        with pytest.raises(ReverieError), translated():
            await call(channel, "Unary", b"a")
    assert calls == [b"a"]


async def test_a_restarted_service_is_found_again(painter: ModuleType, free_port: Callable[[], int]) -> None:
    settings = ServerSettings(port=free_port(), grace_seconds=0.0)
    async with connect(f"127.0.0.1:{settings.port}") as channel:
        waiting = asyncio.create_task(
            repeat_while_unavailable(lambda: call(channel, "Unary", b"a"), limit_seconds=TIMEOUT_SECONDS)
        )
        await asyncio.sleep(0)
        async with Server([painter.served(painter.Painter())], settings):
            assert await waiting == [b"a"]


async def test_repeating_ends(free_port: Callable[[], int]) -> None:
    async with connect(f"127.0.0.1:{free_port()}", retries=False) as channel:
        with pytest.raises(UnavailableError):
            await repeat_while_unavailable(lambda: call(channel, "Unary", b"a"), limit_seconds=0.3)


async def test_repeating_is_for_unavailable_services_only(channel: grpc.aio.Channel) -> None:
    with pytest.raises(errors.NotFoundError):
        await repeat_while_unavailable(lambda: call(channel, "Unary", b"raise:NotFoundError"), limit_seconds=60)


@pytest.mark.parametrize(("limit_seconds", "low", "high"), [(5.0, 3.0, 5.0), (100.0, 10.0, 10.0)])
async def test_a_deadline_is_handed_on(painter: ModuleType, limit_seconds: float, low: float, high: float) -> None:
    seen: list[float] = []

    class Gateway(painter.Painter):  # type: ignore[misc,name-defined]  # the module is loaded at run time
        async def unary(self, request: bytes, context: Any) -> bytes:
            seen.append(remaining_seconds(context, 10.0))
            return request

    async with Server([painter.served(Gateway())], ServerSettings()) as server, connect(server.target) as channel:
        await call(channel, "Unary", b"a", limit_seconds=limit_seconds)
    assert low <= seen[0] <= high
