"""A stack whose services are killed, and small jobs that give the killer time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from reverie.training.v1.job_pb2 import TrainingJobEvent, TrainingJobSpec
from reverie_client import SyncReverie
from reverie_client.specs import load_job_spec
from reverie_client.stack import SERVICES, Stack, StackOptions
from reverie_client.stack.processes import processes_of_stack

NUM_PICTURES = 12
CAPTIONS_PER_PICTURE = 1
SIZES = ((160, 128), (128, 128), (128, 160))

JOB = """
name: chaos
model: {mixed_precision: "no"}
datasets: [{dataset: DATASET, resolution: 128}]
adapter: {lokr: {factor: 4, apply_preset: {target_module: [Attention]}}}
optimization:
  max_steps: STEPS
  gradient_accumulation_steps: 2
  learning_rate: 1e-3
checkpoints: {every_steps: 3, keep: 2}
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Stack]:
    """A running stack. One prompt and one picture at a time, every one of them reported: a kill lands in between."""
    options = StackOptions(
        state_dir=tmp_path_factory.mktemp("stack"),
        checkpoint=str(tiny_checkpoint),
        flags={
            "encoder": ("--max-batch-size", "1"),
            "vae": ("--max-batch-size", "1", "--max-in-flight", "2"),
            "trainer": ("--progress-seconds", "0"),
        },
    )
    with Stack(options.with_ephemeral_ports()) as running:
        yield running


@pytest.fixture(scope="module")
def reverie(stack: Stack) -> Iterator[SyncReverie]:
    """The SDK."""
    with SyncReverie(stack.addresses["trainer"]) as connected:
        yield connected


@pytest.fixture(scope="module")
def make_dataset(reverie: SyncReverie, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Uploads a dataset of which nothing is in the store yet: its pictures and captions depend on its name."""

    def make(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        draw = np.random.default_rng(list(name.encode()))
        for index in range(NUM_PICTURES):
            width, height = SIZES[index % len(SIZES)]
            pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            captions = [f"{name}, picture {index}, caption {number}" for number in range(CAPTIONS_PER_PICTURE)]
            (folder / f"{index}.txt").write_text("\n".join(captions))
        reverie.datasets.create(name)
        reverie.datasets.upload_folder(name, folder)
        return name

    return make


@pytest.fixture(scope="module")
def make_spec() -> Callable[..., TrainingJobSpec]:
    """Makes a job on a dataset."""

    def make(dataset: str, *, num_steps: int) -> TrainingJobSpec:
        return load_job_spec(JOB.replace("DATASET", dataset).replace("STEPS", str(num_steps)))

    return make


@pytest.fixture(scope="module")
def wait_for(reverie: SyncReverie) -> Callable[[str, Callable[[TrainingJobEvent], bool]], TrainingJobEvent]:
    """Follows a job until an event that a test waits for, which must come before the job rests."""

    def wait(job_id: str, is_awaited: Callable[[TrainingJobEvent], bool]) -> TrainingJobEvent:
        for event in reverie.jobs.watch(job_id):
            if is_awaited(event):
                return event
        raise AssertionError(f"the job came to rest too early: {reverie.jobs.get(job_id)}")

    return wait


@pytest.fixture(scope="module")
def worker(stack: Stack) -> Callable[[], psutil.Process]:
    """Finds the one worker that the stack's trainer has started."""

    def find() -> psutil.Process:
        services = {stack.pid(name) for name in SERVICES}
        others = [psutil.Process(found.pid) for found in processes_of_stack(stack.state.path)]
        workers = [each for each in others if each.pid not in services and "reverie_trainer.worker" in each.cmdline()]
        (only,) = workers
        return only

    return find
