"""Workers as processes: found again, told apart from strangers, stopped and killed."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from reverie_trainer.jobs.running.launcher import LocalLauncher, WorkerCommand

MakeLauncher = Callable[..., LocalLauncher]


@pytest.fixture
def make_launcher(tmp_path: Path) -> Iterator[MakeLauncher]:
    """Makes launchers of workers that only wait."""
    made = []

    def make(num_standby: int = 0) -> LocalLauncher:
        command = WorkerCommand(
            arguments=[],
            environment={"PYTHONPATH": str(Path(__file__).parent)},
            log_dir=tmp_path / "logs",
            module="idle_worker",
            num_standby=num_standby,
        )
        made.append(LocalLauncher(command))
        return made[-1]

    yield make
    for launcher in made:
        launcher.close()


async def until(is_reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_reached():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.02)


async def test_worker_gets_its_secret_and_writes_its_own_log(make_launcher: MakeLauncher) -> None:
    launcher = make_launcher()
    process = launcher.start("job-1", "the-secret", 1)
    await until(lambda: launcher.last_lines(process) == ["token the-secret"])
    assert "the-secret" not in " ".join(psutil.Process(int(process["pid"])).cmdline())
    assert os.getsid(int(process["pid"])) == int(process["pid"])
    launcher.kill(process)
    await until(lambda: not launcher.is_alive(process))


async def test_another_launcher_finds_a_running_worker_and_stops_it(make_launcher: MakeLauncher) -> None:
    first, second = make_launcher(), make_launcher()
    process = first.start("job-2", "secret", 1)
    assert second.is_alive(process)
    await until(lambda: first.last_lines(process) != [])
    second.stop(process)
    await until(lambda: not second.is_alive(process))


def test_process_that_took_over_the_number_is_no_worker(make_launcher: MakeLauncher) -> None:
    launcher = make_launcher()
    stranger = {"pid": str(os.getpid()), "start_ticks": "1", "log": "none"}
    assert not launcher.is_alive(stranger)
    launcher.kill(stranger)


def test_process_that_nobody_waited_for_is_not_alive(make_launcher: MakeLauncher) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        ticks = Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[19]
        assert not make_launcher().is_alive({"pid": str(zombie.pid), "start_ticks": ticks, "log": ""})


def test_log_that_is_gone_is_told_and_no_error(make_launcher: MakeLauncher) -> None:
    assert "cannot be read" in make_launcher().last_lines({"pid": "1", "log": "/nowhere/worker.log"})[0]


@pytest.fixture
async def dead_standby(make_launcher: MakeLauncher) -> LocalLauncher:
    """A launcher whose waiting worker has died: the idle stand-in ends at once without a secret."""
    launcher = make_launcher(num_standby=1)
    before = set(psutil.Process().children())
    launcher.warm_up()
    (standby,) = set(psutil.Process().children()) - before
    await until(lambda: standby.status() == psutil.STATUS_ZOMBIE)
    return launcher


async def test_waiting_worker_that_died_is_replaced_by_a_fresh_one(dead_standby: LocalLauncher) -> None:
    process = dead_standby.start("job-3", "secret", 1)
    await until(lambda: dead_standby.last_lines(process) == ["token secret"])
    dead_standby.kill(process)


async def test_waiting_workers_that_die_are_not_started_without_pause(
    dead_standby: LocalLauncher, tmp_path: Path
) -> None:
    for _ in range(20):
        dead_standby.warm_up()
    assert len(list((tmp_path / "logs").glob("standby.*"))) == 1
