"""The embedded store: it starts closed to strangers, says why when it cannot, and leaves nothing behind."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from reverie_common.errors import FailedPreconditionError, StoreUnavailableError
from reverie_common.ports import free_ports, require_free_port
from reverie_common.settings import StoreSettings
from reverie_common.storage.seaweed import Seaweed, find_weed, weed_flags


def test_it_listens_on_loopback_only(seaweed: Seaweed) -> None:
    assert seaweed.process is not None
    connections = psutil.Process(seaweed.process.pid).net_connections(kind="inet")
    listening = {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_it_reports_to_nobody() -> None:
    flags = weed_flags(Path("data"), list(range(10)), "b")
    assert "-master.telemetry=false" in flags


def test_no_two_ports_are_the_same() -> None:
    ports = free_ports(10, first=1234)
    assert ports[0] == 1234
    assert len(set(ports)) == 10


def test_no_port_is_one_that_outgoing_connections_get() -> None:
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(1024 < port < first_ephemeral for port in free_ports(50))


def test_starting_twice_is_starting_once(seaweed: Seaweed) -> None:
    process = seaweed.process
    seaweed.start()
    assert seaweed.process is process


def test_its_environment_opens_its_store(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    settings = StoreSettings.from_command_line([])
    assert settings.store_endpoint == seaweed.endpoint
    assert settings.store_secret_key.get_secret_value() == seaweed.secret_key


def test_objects_survive_a_stop(tmp_path: Path) -> None:
    server = Seaweed(tmp_path / "data")
    server.start()
    try:
        port = server.port
        server.open_store().create("a", b"kept")
        server.stop()
        assert not server.is_running
        server.start()
        assert server.port == port
        assert server.open_store().get("a") == b"kept"
    finally:
        server.stop()


def test_stopping_may_be_repeated(tmp_path: Path) -> None:
    server = Seaweed(tmp_path)
    server.stop()
    server.stop()
    assert not server.is_running


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FailedPreconditionError) as caught:
            Seaweed(tmp_path, port=port).start()
    assert caught.value.reason == "PORT_IN_USE"
    assert caught.value.metadata == {"host": "127.0.0.1", "port": str(port), "flag": "--store-port"}
    assert "--store-port" in caught.value.message


def test_a_free_port_is_not_refused(free_port: Callable[[], int]) -> None:
    require_free_port("127.0.0.1", free_port(), "--port")


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    server = Seaweed(tmp_path / "data", extra_flags=("-volume.max=many",))
    with pytest.raises(StoreUnavailableError) as caught:
        server.start()
    assert caught.value.reason == "EMBEDDED_STORE_FAILED"
    assert "not a valid number many" in caught.value.message
    assert caught.value.metadata["log"] == str(tmp_path / "data" / "weed.log")
    assert not server.is_running


def test_ports_that_were_taken_meanwhile_are_chosen_anew(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flag = f"-volume.port={taken.getsockname()[1]}"
        with pytest.raises(StoreUnavailableError, match="Port allocation failed"):
            Seaweed(tmp_path / "data", extra_flags=(flag,)).start()


def test_a_server_that_is_not_ready_in_time_is_stopped(tmp_path: Path) -> None:
    server = Seaweed(tmp_path / "data")
    with pytest.raises(StoreUnavailableError, match="not ready within 0 s"):
        server.start(timeout_seconds=0.0)
    assert not server.is_running


def test_weed_is_found_beside_python() -> None:
    assert find_weed() == Path(sys.executable).with_name("weed")


def test_weed_that_is_not_installed_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="pip install") as caught:
        find_weed(python=tmp_path / "python", search_path=str(tmp_path))
    assert caught.value.reason == "WEED_NOT_FOUND"


def test_weed_is_found_on_the_path(tmp_path: Path) -> None:
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_weed(python=tmp_path / "bin" / "python", search_path=str(tmp_path)) == program


def test_no_port_is_chosen_again_before_it_is_used() -> None:
    chosen = [port for _ in range(20) for port in free_ports(10)]
    assert len(set(chosen)) == len(chosen)
