"""What a stack keeps, and how it knows its processes. No services, no sockets."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from reverie_client.stack import Stack, StackOptions, read_status
from reverie_client.stack.options import default_state_dir, service_flags
from reverie_client.stack.processes import (
    STACK_VARIABLE,
    ProcessIdentity,
    end,
    identify,
    processes_of_stack,
)
from reverie_client.stack.state import ServiceRecord, StateDirectory
from reverie_common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    state = StateDirectory(path=tmp_path / "state")
    state.make()
    return state


def record_of(pid: int, start_ticks: int) -> ServiceRecord:
    return ServiceRecord(pid=pid, start_ticks=start_ticks, address="127.0.0.1:1", metrics_port=0)


def test_credentials_are_made_once_and_private(state: StateDirectory) -> None:
    first = state.credentials()
    assert state.credentials() == first
    assert len(first.secret_key) == 40
    assert stat.S_IMODE((state.path / "credentials.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_record_reads_back(state: StateDirectory) -> None:
    services = {"vae": record_of(1, 2)}
    state.save(services)
    assert state.load() == services
    state.save({})
    assert state.load() == {}


def test_record_of_another_version_is_refused(state: StateDirectory) -> None:
    (state.path / "stack.json").write_text('{"format": 99}')
    with pytest.raises(FailedPreconditionError, match="another version"):
        state.load()


def test_directory_is_held_once(state: StateDirectory) -> None:
    with state.locked(), pytest.raises(FailedPreconditionError, match="another `reverie`"), state.locked():
        pass


def test_second_start_is_refused_while_a_process_lives(state: StateDirectory) -> None:
    this = identify(os.getpid())
    state.save({"trainer": record_of(this.pid, this.start_ticks)})
    with pytest.raises(FailedPreconditionError, match=rf"up already .* trainer \(process {this.pid}\)"):
        Stack(StackOptions(state_dir=state.path).with_ephemeral_ports()).start()


def test_a_number_that_belongs_to_another_process_now_is_not_ours(state: StateDirectory) -> None:
    this = identify(os.getpid())
    other = ProcessIdentity(pid=this.pid, start_ticks=this.start_ticks + 1)
    assert this.is_alive
    assert not other.is_alive
    state.save({"vae": record_of(other.pid, other.start_ticks)})
    health = {service.name: service.health for service in read_status(state.path)}
    assert health["vae"] == "dead"
    assert health["trainer"] == "stopped"


def test_processes_of_a_stack_are_found_and_ended_also_in_other_sessions(tmp_path: Path) -> None:
    child = subprocess.Popen(SLEEPER, env={**os.environ, STACK_VARIABLE: str(tmp_path)}, start_new_session=True)
    try:
        found = wait_for_processes(tmp_path)
        assert [process.pid for process in found] == [child.pid]
        assert found[0].memory_bytes > 0
        assert processes_of_stack(tmp_path / "other") == []
        end(found, 10)
        assert not found[0].is_alive
    finally:
        child.kill()
        child.wait()


def wait_for_processes(directory: Path) -> Sequence[ProcessIdentity]:
    """A process that was just started has no environment to be read for a moment, until the kernel has laid it out."""
    deadline = time.monotonic() + 10
    while not (found := processes_of_stack(directory)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(SLEEPER)
    identity = identify(child.pid)
    child.kill()
    end([identity], 10)
    assert not identity.is_alive
    child.wait()


def test_unknown_service_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        StackOptions(state_dir=tmp_path, ports={"trianer": 1})
    assert caught.value.violations[0].field == "trianer"


def test_missing_checkpoint_is_named_before_anything_starts(tmp_path: Path) -> None:
    options = StackOptions(state_dir=tmp_path / "state", checkpoint=str(tmp_path / "none")).with_ephemeral_ports()
    with pytest.raises(NotFoundError, match="none is not a directory"):
        Stack(options).start()


def test_state_dir_honours_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert default_state_dir() == Path("/somewhere/reverie")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert default_state_dir() == Path.home() / ".local" / "state" / "reverie"


def test_settings_of_services_become_their_flags() -> None:
    flags = service_flags(["sampler.clip-model=a/b=c", "vae.preview_decoder=none", "sampler.max_adapters=2"])
    assert flags == {"sampler": ("--clip-model=a/b=c", "--max-adapters=2"), "vae": ("--preview-decoder=none",)}


def test_what_is_no_setting_is_named() -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        service_flags(["sampler", "a.b=c", "SAMPLER.x=1"])
    assert [violation.description[:10] for violation in refusal.value.violations] == ["'sampler' ", "'SAMPLER.x"]
