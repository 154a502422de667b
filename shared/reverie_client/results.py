"""A job's results in a folder: job.json, what the job made, its measures, and the pictures that sum it up."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.json_format import MessageToJson
from reverie.training.v1.job_pb2 import StepMetrics, TrainingJob, ValidationImage
from reverie.training.v1.measures_pb2 import EvaluationResult

from reverie_client.client import Reverie
from reverie_client.report import Metrics, draw_loss, draw_sheet, find_pictures
from reverie_client.scores import write_evaluations, write_scores
from reverie_client.transfer import OnProgress, ignore_progress

ADAPTER_PATH = "adapter/pytorch_lora_weights.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What is in the folder now."""

    folder: Path
    job: TrainingJob
    files: tuple[Path, ...]
    """What the job made, as downloaded."""
    sheet: Path | None
    """None where the job has drawn no picture."""
    loss: Path | None
    """None where the job has done no step."""
    scores: Path | None
    """None where no picture was scored."""
    evaluations: Path | None
    """None where no evaluation loss was measured."""


async def write_results(
    reverie: Reverie, job_id: str, folder: Path, *, on_progress: OnProgress = ignore_progress
) -> Results:
    """Fetch a job's files into a folder and draw sheet.png and loss.png. May be repeated, also while the job runs.

    Raises NotFoundError, TransferError, IntegrityError; ModuleNotFoundError where Pillow or matplotlib is missing.
    """
    files = await reverie.jobs.fetch(job_id, folder, on_progress=on_progress)
    steps = await reverie.jobs.metrics(job_id)
    images = await reverie.jobs.validation_images(job_id)
    evaluations = await reverie.jobs.evaluations(job_id)
    job = await reverie.jobs.get(job_id)
    return await asyncio.to_thread(_draw, job, folder, files, metrics_of(steps), images, evaluations)


def _draw(
    job: TrainingJob,
    folder: Path,
    files: tuple[Path, ...],
    metrics: Metrics,
    images: tuple[ValidationImage, ...],
    evaluations: tuple[EvaluationResult, ...],
) -> Results:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(job_json(job), encoding="utf-8")
    wanted = set(files)
    pictures = [picture for picture in find_pictures(folder / "validation") if picture.path in wanted]
    title = f"{job.spec.name} ({job.job_id})"
    return Results(
        folder=folder,
        job=job,
        files=files,
        sheet=draw_sheet(job, pictures, folder / "sheet.png") if pictures else None,
        loss=draw_loss(title, metrics, folder / "loss.png") if metrics.steps else None,
        scores=write_scores(images, folder),
        evaluations=write_evaluations(evaluations, folder),
    )


def job_json(job: TrainingJob) -> str:
    """Return a job in the JSON form that job files have."""
    return json.dumps(json.loads(MessageToJson(job, preserving_proto_field_name=True)), indent=2) + "\n"


def metrics_of(steps: tuple[StepMetrics, ...]) -> Metrics:
    """Return the figures of steps as columns."""
    return Metrics(
        steps=tuple(step.step for step in steps),
        losses=tuple(step.loss for step in steps),
        learning_rates=tuple(step.learning_rate for step in steps),
    )
