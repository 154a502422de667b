"""The main job, end to end, on this machine: `make demo`.

Starts the embedded stack on loopback, uploads the photographs beside this file, submits job.yaml, follows it, and
writes what came out to demo-output/. What the stack keeps stays in demo-output/.state, so that the next run finds every
embedding and latent in the store.
"""

import argparse
import asyncio
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    from reverie.training.v1.job_pb2 import TrainingJob, TrainingJobState
    from reverie_client import Reverie, read_folders
    from reverie_client.cli.console import EXIT_INTERRUPTED, OutputFormat, exit_code_of, print_error, print_table
    from reverie_client.cli.job_text import hit_rate
    from reverie_client.cli.progress import JobView, TransferBar, readable_bytes
    from reverie_client.results import ADAPTER_PATH, Results, write_results
    from reverie_client.specs import load_job_spec
    from reverie_client.stack import Stack, StackOptions
    from reverie_common.errors import AlreadyExistsError, ReverieError
    from rich.console import Console
except KeyboardInterrupt:
    sys.stderr.write("interrupted: nothing was started\n")
    sys.exit(130)

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
WRITTEN = ("job.json", "adapter", "validation", "sheet.png", "loss.png", "metrics.jsonl")
UNFINISHED = (
    TrainingJobState.TRAINING_JOB_STATE_QUEUED,
    TrainingJobState.TRAINING_JOB_STATE_PREPARING,
    TrainingJobState.TRAINING_JOB_STATE_TRAINING,
)


@dataclass(kw_only=True, slots=True)
class Clock:
    """Seconds spent in each part of the demo."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure one part."""
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=PROJECT / "demo-output", help="folder for the results")
    parser.add_argument("--job", type=Path, default=HERE / "job.yaml", help="the job to run")
    parser.add_argument("--again", action="store_true", help="submit the job a second time: it encodes nothing")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    output: Path = arguments.output
    signal.signal(signal.SIGTERM, interrupt)
    try:
        run_demo(output, arguments.job, 2 if arguments.again else 1, console)
    except KeyboardInterrupt:
        console.print(f"interrupted: every process is stopped. {what_is_left(output)}")
        return EXIT_INTERRUPTED
    except ReverieError as error:
        print_error(error, OutputFormat.TEXT)
        console.print(f"every process is stopped. {what_is_left(output)}; its logs are in {output / '.state' / 'logs'}")
        return exit_code_of(error)
    return 0


def interrupt(_: int, __: Any) -> None:
    """Make SIGTERM what Ctrl-C is."""
    raise KeyboardInterrupt


def what_is_left(output: Path) -> str:
    """Say what a stopped demo leaves behind."""
    return f"Left: what the store and the trainer keep, in {output / '.state'}; `make demo` goes on from there"


def run_demo(output: Path, job_file: Path, num_runs: int, console: Console) -> None:
    """Start the stack, run the job, write the results, stop the stack."""
    spec = load_job_spec(job_file)
    clock = Clock()
    options = StackOptions(state_dir=output / ".state").with_ephemeral_ports()
    stack = Stack(options)
    try:
        with clock.measure("start the stack"), console.status("starting the stack"):
            stack.start()
        console.print(f"stack up on loopback: trainer {stack.addresses['trainer']}")
        for _ in range(num_runs):
            results = asyncio.run(run_job(stack.addresses["trainer"], spec, output, clock, console))
            print_summary(results, clock, console)
    finally:
        # Whoever presses Ctrl-C twice means it; but nothing may be left behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        console.print("stopping the stack")
        stack.stop()


async def run_job(address: str, spec: Any, output: Path, clock: Clock, console: Console) -> Results:
    """Upload, submit, follow, fetch."""
    async with Reverie(address) as reverie:
        await cancel_leftovers(reverie, console)
        with clock.measure("upload"):
            await upload(reverie, spec.datasets[0].dataset, console)
        with clock.measure("job"):
            job = await reverie.jobs.submit(spec)
            console.print(f"job {job.job_id}")
            with JobView(console) as view:
                await reverie.jobs.result(job.job_id, on_event=view.show)
        await asyncio.to_thread(clear, output)
        with clock.measure("fetch and draw"), TransferBar(console, "download") as bar:
            return await write_results(reverie, job.job_id, output, on_progress=bar.update)


async def cancel_leftovers(reverie: Reverie, console: Console) -> None:
    """Cancel the jobs of a demo that was interrupted, so that this one need not wait for them."""
    for job in await reverie.jobs.list(states=UNFINISHED):
        console.print(f"cancelling {job.job_id}, which an earlier demo left unfinished")
        await reverie.jobs.cancel(job.job_id)
        await reverie.jobs.wait(job.job_id)


async def upload(reverie: Reverie, dataset: str, console: Console) -> None:
    """Bring the photographs to the store and make them a dataset; what is there is not sent again."""
    local = await asyncio.to_thread(read_folders, [HERE / "photos"])
    try:
        await reverie.datasets.create(dataset)
    except AlreadyExistsError:
        console.print(f"the dataset {dataset} is there already")
    with TransferBar(console, "upload") as bar:
        await reverie.datasets.upload(dataset, local, on_progress=bar.update)


def clear(output: Path) -> None:
    """Remove the results of an earlier run, and nothing else."""
    for name in WRITTEN:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def print_summary(results: Results, clock: Clock, console: Console) -> None:
    """Print the closing table and where everything is."""
    job = results.job
    rows: list[tuple[str, str]] = []
    for name, seconds in clock.seconds.items():
        rows.append((name, f"{seconds:.1f} s"))
        if name == "job":  # the parts overlap: pictures are drawn beside training
            rows += [(f"- {phase.name.replace('_', ' ')}", f"{phase.seconds:.1f} s") for phase in job.phases]
    console.print()
    print_table(("phase", "time"), rows)
    console.print()
    print_table(("result", ""), summary(job))
    console.print()
    validation = results.folder / "validation"
    for path in (results.folder / "job.json", results.folder / ADAPTER_PATH, validation, results.sheet, results.loss):
        console.print(str(path), soft_wrap=True)


def summary(job: TrainingJob) -> list[tuple[str, str]]:
    """Return the figures of a finished job."""
    found = job.preparation
    train_seconds = sum(phase.seconds for phase in job.phases if phase.name == "train")
    cached = f"{found.num_images_cached} of {found.num_images} images, "
    cached += f"{found.num_prompts_cached} of {found.num_prompts} captions"
    return [
        ("steps", f"{job.step}, {job.step / train_seconds if train_seconds else 0:.2f} steps/s"),
        ("loss at the last step", f"{job.metrics.loss:.4f}"),
        ("cache hits", f"hit rate {hit_rate(found):.2f} ({cached})"),
        ("adapter", f"{job.adapter_report.num_modules} modules, {job.adapter_report.num_parameters:,} parameters"),
        ("adapter size", readable_bytes(job.adapter.size_bytes)),
    ]


if __name__ == "__main__":
    sys.exit(main())
