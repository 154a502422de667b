"""What is said about an event: one form for every kind of webhook (spec 7.5)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2

from reverie_trainer.jobs.preparing.prompt_library import prompt_texts
from reverie_trainer.jobs.state.records import CANCELLED, FAILED, PREPARING, SUCCEEDED, TRAINING, state_name

SEVERITIES = ("debug", "info", "warning", "error", "critical")
"""From the least to the greatest."""

_STAGES: Mapping[int, tuple[str, str]] = {
    PREPARING: ("preparation", "Preparing data"),
    TRAINING: ("training", "Training"),
    SUCCEEDED: ("training_complete", "Training complete"),
    FAILED: ("training_failed", "Training failed"),
    CANCELLED: ("training_cancelled", "Training cancelled"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """Something to say."""

    type: str
    severity: str
    title: str
    body: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    image: common_pb2.ObjectRef | None = None
    """A PNG in the store."""
    is_preview: bool = False
    """Worth nothing when it is late."""


def message_of(event: job_pb2.TrainingJobEvent, job: job_pb2.TrainingJob) -> Message | None:
    """Return what an event says, None for those that say nothing to people elsewhere."""
    kind = event.WhichOneof("payload") or ""
    describe = _DESCRIBE.get(kind)
    return describe(getattr(event, kind), job) if describe is not None else None


def _state(change: job_pb2.StateChanged, job: job_pb2.TrainingJob) -> Message | None:
    stage = _STAGES.get(change.to_state)
    if stage is None:
        return None
    key, label = stage
    severity = "error" if change.to_state == FAILED else "info"
    total = job.spec.optimization.max_steps
    return Message(
        type="lifecycle.stage",
        severity=severity,
        title=f"{label}: {job.spec.name}",
        body=change.message,
        data={
            "stage": {
                "key": key,
                "label": label,
                "status": "completed" if change.to_state == SUCCEEDED else state_name(change.to_state).lower(),
                "progress": _progress(label, job.step, total),
            }
        },
    )


def _step(step: job_pb2.StepMetrics, job: job_pb2.TrainingJob) -> Message:
    total = job.spec.optimization.max_steps
    return Message(
        type="training.status",
        severity="debug",
        title=f"Step {step.step}/{total}: {job.spec.name}",
        body=f"loss {step.loss:.4f}, {step.step_seconds:.2f} s/step",
        data={
            "step": step.step,
            "loss": step.loss,
            "learning_rate": step.learning_rate,
            "gradient_norm": step.gradient_norm,
            "step_seconds": step.step_seconds,
            "epoch": step.epoch,
            "progress": _progress("Training", step.step, total),
        },
    )


def _checkpoint(checkpoint: job_pb2.Checkpoint, job: job_pb2.TrainingJob) -> Message:
    return Message(
        type="training.checkpoint",
        severity="info",
        title=f"Checkpoint at step {checkpoint.step}: {job.spec.name}",
        data={"step": checkpoint.step, "sha256": checkpoint.adapter.sha256},
    )


def _preview(preview: job_pb2.ValidationPreview, job: job_pb2.TrainingJob) -> Message:
    label = f"{preview.sampling_step}/{preview.num_sampling_steps}"
    return Message(
        type="validation.image",
        severity="info",
        title=f"Validation (step {label}): {preview.prompt_name}",
        body=_prompt(job, preview.prompt_name),
        data={
            "step": preview.sampling_step,
            "timestep": preview.timestep,
            "resolution": [preview.width, preview.height],
            "validation_type": "intermediary",
            "prompt": _prompt(job, preview.prompt_name),
            "step_label": label,
            "training_step": preview.step,
        },
        image=preview.image,
        is_preview=True,
    )


def _picture(picture: job_pb2.ValidationImage, job: job_pb2.TrainingJob) -> Message:
    prompt = _prompt(job, picture.prompt_name)
    what = "base model" if picture.step == 0 else f"step {picture.step}"
    weights = " (EMA)" if picture.weights == "ema" else ""
    data: dict[str, Any] = {
        "step": picture.step,
        "resolution": [picture.width, picture.height],
        "validation_type": "final" if picture.step == job.spec.optimization.max_steps else "checkpoint",
        "prompt": prompt,
        "weights": picture.weights or "adapter",
    }
    score = ""
    if picture.HasField("clip_score"):
        data["clip_score"] = picture.clip_score
        score = f"\nCLIP score: {picture.clip_score:.2f}"
    return Message(
        type="validation.image",
        severity="info",
        title=f"Validation ({what}{weights}): {picture.prompt_name}",
        body=f"{prompt}{score}",
        data=data,
        image=picture.image,
    )


def _evaluation(result: Any, job: job_pb2.TrainingJob) -> Message:
    return Message(
        type="training.evaluation",
        severity="info",
        title=f"Evaluation loss at step {result.step}: {job.spec.name}",
        body=f"{result.dataset}: {result.loss:.5f}",
        data={"step": result.step, "dataset": result.dataset, "loss": result.loss},
    )


def _notice(notice: job_pb2.JobNotice, job: job_pb2.TrainingJob) -> Message:
    is_warning = notice.severity == job_pb2.NOTICE_SEVERITY_WARNING
    return Message(
        type="notification",
        severity="warning" if is_warning else "info",
        title=f"{notice.reason}: {job.spec.name}",
        body=notice.message,
        data={"reason": notice.reason},
    )


_DESCRIBE: Mapping[str, Any] = {
    "state_changed": _state,
    "step": _step,
    "checkpoint": _checkpoint,
    "validation_preview": _preview,
    "validation_image": _picture,
    "evaluation": _evaluation,
    "notice": _notice,
}


def _progress(label: str, current: int, total: int) -> dict[str, Any]:
    percent = round(100 * current / total, 2) if total else 0.0
    return {"label": label, "current": current, "total": total, "percent": percent}


def _prompt(job: job_pb2.TrainingJob, name: str) -> str:
    return prompt_texts(job.spec.validation).get(name, name)
