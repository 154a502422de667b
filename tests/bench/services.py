"""The whole product on this machine: how fast a job gets going, whether training waits for data, what memory it takes.

One stack in a temporary directory on free ports, with the tiny checkpoint and its default settings. A first job
prepares fresh data (the quickstart's photographs in several orientations, each with several captions) and draws a few
pictures; later ones train on the same data on warm services, that is with the standby worker ready and everything in
the store.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
from PIL import Image, ImageOps
from reverie.training.v1.job_pb2 import StepMetrics, TrainingJob, TrainingJobEvent, TrainingJobSpec
from reverie_client import SyncReverie
from reverie_client.specs import load_job_spec
from reverie_client.stack import SERVICES, Stack, StackOptions
from reverie_client.stack.processes import processes_of_stack

from tests.bench.report import Figure

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
DATASET = "bench"
CAPTIONS_PER_PICTURE = 4
NUM_STEPS = 30
NUM_WARM_JOBS = 3
READY_SECONDS = 60.0
STANDBY_IS_READY = "ready and waiting for a job"
MIB = 1024 * 1024


def measure() -> Iterator[Figure]:
    """Yield preparation rates, first step after submit, share of waiting for data, and memory of each process."""
    with tempfile.TemporaryDirectory(prefix="reverie-bench-") as folder:
        options = StackOptions(state_dir=Path(folder) / "state").with_ephemeral_ports()
        with Stack(options) as stack, SyncReverie(stack.addresses["trainer"]) as reverie:
            yield from _measure(stack, reverie, Path(folder) / "photos")


def _measure(stack: Stack, reverie: SyncReverie, photos: Path) -> Iterator[Figure]:
    write_pictures(photos)
    reverie.datasets.create(DATASET)
    reverie.datasets.upload_folder(DATASET, photos)
    memory: dict[str, int] = {}
    events = list(follow(reverie, job_spec(draws=True), lambda: note_memory(stack, memory)))
    yield from preparation_figures(events)
    warm = [run_warm(stack, reverie) for _ in range(NUM_WARM_JOBS)]
    yield Figure(
        name="first step after submit on warm services, data prepared",
        value=statistics.median(seconds for seconds, _ in warm),
        unit="s",
        at_most=3.0,
    )
    steps = [step for _, steps in warm for step in steps]
    yield Figure(
        name="share of the step time spent waiting for data",
        value=100 * sum(step.data_wait_seconds for step in steps) / sum(step.step_seconds for step in steps),
        unit="%",
        at_most=5.0,
    )
    yield Figure(
        name="training in the running stack",
        value=len(steps) / sum(step.step_seconds for step in steps),
        unit="steps/s",
    )
    for name in sorted(memory, key=[*SERVICES, "worker"].index):
        yield Figure(name=f"memory of the {name} (most seen while a job ran)", value=memory[name] / MIB, unit="MiB")


def write_pictures(folder: Path) -> None:
    """Write the quickstart's photographs as they are, mirrored and upside down, with captions that all differ."""
    folder.mkdir()
    turns: dict[str, Callable[[Image.Image], Image.Image]] = {
        "plain": ImageOps.exif_transpose,
        "mirrored": lambda photo: ImageOps.mirror(ImageOps.exif_transpose(photo)),
        "turned": lambda photo: ImageOps.flip(ImageOps.exif_transpose(photo)),
    }
    for photo in sorted((QUICKSTART / "photos").glob("*.jpg")):
        caption = photo.with_suffix(".txt").read_text().strip()
        for turn, apply in turns.items():
            with Image.open(photo) as opened:
                apply(opened).convert("RGB").save(folder / f"{photo.stem}-{turn}.jpg", quality=90)
            lines = [f"{caption}, {turn}, variant {number}" for number in range(CAPTIONS_PER_PICTURE)]
            (folder / f"{photo.stem}-{turn}.txt").write_text("\n".join(lines) + "\n")


def job_spec(*, draws: bool) -> TrainingJobSpec:
    """The quickstart job on the bench's pictures, shorter; with two small pictures or none."""
    spec = load_job_spec(QUICKSTART / "job.yaml")
    spec.name = DATASET
    spec.datasets[0].dataset = DATASET
    spec.optimization.max_steps = NUM_STEPS
    spec.checkpoints.every_steps = NUM_STEPS
    if not draws:
        spec.ClearField("validation")
        return spec
    spec.validation.every_steps = NUM_STEPS
    spec.validation.num_inference_steps = 4
    del spec.validation.prompts[1:]
    return spec


def follow(reverie: SyncReverie, spec: TrainingJobSpec, on_event: Callable[[], None]) -> Iterator[TrainingJobEvent]:
    """Submit a job and yield its events until it has succeeded."""
    job = reverie.jobs.submit(spec)
    for event in reverie.jobs.watch(job.job_id):
        on_event()
        yield event
    require_success(reverie.jobs.get(job.job_id))


def require_success(job: TrainingJob) -> None:
    """Refuse to print figures of a job that failed."""
    if job.HasField("failure"):
        raise RuntimeError(f"the benchmark's job failed ({job.failure.reason}): {job.failure.message}")


def preparation_figures(events: Iterable[TrainingJobEvent]) -> Iterator[Figure]:
    """Rates from the first to the last report of each stage; prompts and images are encoded at the same time."""
    reports = [event for event in events if event.HasField("preparation")]
    for stage, what in (("inspect", "images opened"), ("encode_images", "images"), ("encode_prompts", "prompts")):
        own = [event for event in reports if event.preparation.stage == stage]
        seconds = own[-1].time.ToNanoseconds() / 1e9 - own[0].time.ToNanoseconds() / 1e9
        done = own[-1].preparation.num_done
        yield Figure(name=f"fresh preparation, {done} {what}", value=done / seconds, unit=f"{what.split()[0]}/s")


def run_warm(stack: Stack, reverie: SyncReverie) -> tuple[float, list[StepMetrics]]:
    """Run a job whose data are prepared: seconds from before the submit until its first step is told, and its steps."""
    wait_for_standby(stack)
    begin = time.monotonic()
    first = 0.0
    steps: list[StepMetrics] = []
    for event in follow(reverie, job_spec(draws=False), lambda: None):
        if event.HasField("step"):
            first = first or time.monotonic() - begin
            steps.append(event.step)
    return first, steps


def wait_for_standby(stack: Stack) -> None:
    """Wait until the trainer's standby worker says that it is ready."""
    deadline = time.monotonic() + READY_SECONDS
    while not standby_is_ready(stack):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no standby worker was ready within {READY_SECONDS:g} s")
        time.sleep(0.05)


def standby_is_ready(stack: Stack) -> bool:
    """Whether a worker waits for a job. Its log takes the name of its job once it has one."""
    logs = (stack.state.service_dir("trainer") / "workers").glob("standby.*.log")
    return any(STANDBY_IS_READY in log.read_text(errors="replace") for log in logs)


def note_memory(stack: Stack, most: dict[str, int]) -> None:
    """Keep the most resident memory seen of each process of the stack."""
    services = {stack.pid(name): name for name in SERVICES}
    for process in processes_of_stack(stack.state.path):
        name = services.get(process.pid) or ("worker" if is_worker(process.pid) else None)
        if name is not None:
            most[name] = max(most.get(name, 0), process.memory_bytes)
    store = psutil.Process(stack.pid("store")).memory_info().rss
    most["store"] = max(most.get("store", 0), store)


def is_worker(pid: int) -> bool:
    """Whether a process is a worker of the trainer."""
    try:
        return "reverie_trainer.worker" in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
