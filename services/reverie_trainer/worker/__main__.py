"""`python -m reverie_trainer.worker`: trains one job. The trainer starts it; see `--help` for doing so by hand."""

from __future__ import annotations

import logging
import os
import signal
import sys

from reverie_common.errors import ReverieError
from reverie_common.process import log_fatal
from reverie_common.telemetry.logs import configure_logging
from reverie_common.telemetry.metrics import serve_metrics

from reverie_trainer.worker.orders import Order, Orders
from reverie_trainer.worker.settings import WorkerSettings

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run one worker; returns the exit status.

    0: the job is completed (its outcome is with the trainer), or none came; 3: another worker has it; 4: the trainer is
    gone; 1: something that another worker may survive.
    """
    try:
        settings = WorkerSettings.from_command_line(arguments)
    except ReverieError as error:
        log_fatal(error)
        return 2
    configure_logging("worker", settings.log_format, level=settings.log_level)
    orders = Orders()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: orders.give(Order.STOP, "the process was told to end"))
    try:
        return _run(settings, orders)
    except ReverieError as error:
        log_fatal(error)
        return 1


def _run(settings: WorkerSettings, orders: Orders) -> int:
    # Read when torch loads OpenMP. Threads that spin while they wait for one another make a step 20 times as long when
    # a sampler wants the same cores (measured: 3.9 s, asleep 0.2 s); asleep they cost nothing measurable.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Seconds of imports: after the flags were checked.
    from reverie_trainer.worker.compute import configure_torch, warm_up

    configure_torch(num_threads=settings.num_threads)
    job_id, token = settings.job_id, settings.token.get_secret_value()
    if settings.standby:
        warm_up()
        assignment = _wait_for_assignment(orders)
        if assignment is None:
            return 0
        job_id, token = assignment
    from reverie_trainer.worker.run import run_worker

    server = serve_metrics(settings.metrics_host, settings.metrics_port, service="worker")
    try:
        return run_worker(settings, job_id=job_id, token=token, orders=orders)
    finally:
        server.close()


def _wait_for_assignment(orders: Orders) -> tuple[str, str] | None:
    """Read `JOB_ID TOKEN` from standard input; None if there is none to come."""
    logger.info("ready and waiting for a job")
    # A signal while we wait ends the process: nothing was begun.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    line = sys.stdin.readline()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: orders.give(Order.STOP, "the process was told to end"))
    words = line.split()
    if not words:
        return None
    if len(words) != 2:
        raise SystemExit(f"expected one line `JOB_ID TOKEN` on standard input, got {len(words)} words")
    return words[0], words[1]


if __name__ == "__main__":
    raise SystemExit(main())
