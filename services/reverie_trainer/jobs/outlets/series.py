"""The curves of a job, under the names that trackers' users know (spec 5.10)."""

from collections.abc import Iterator
from typing import Any

from reverie.training.v1 import job_pb2


def scalars_of(event: job_pb2.TrainingJobEvent) -> tuple[int, dict[str, float]]:
    """Return the step and the values that an event adds to the curves; empty where it adds none."""
    if event.HasField("step"):
        return event.step.step, dict(_of_step(event.step))
    if event.HasField("evaluation"):
        return event.evaluation.step, dict(_of_evaluation(event.evaluation))
    if event.HasField("validation_image") and event.validation_image.HasField("clip_score"):
        picture = event.validation_image
        return picture.step, {f"clip/{picture.prompt_name}": picture.clip_score}
    return 0, {}


def _of_step(step: job_pb2.StepMetrics) -> Iterator[tuple[str, float]]:
    yield "train_loss", step.loss
    yield "learning_rate", step.learning_rate
    yield "grad_norm", step.gradient_norm
    yield "grad_absmax", step.gradient_absmax
    yield "epoch", step.epoch
    yield "step_seconds", step.step_seconds
    yield "data_wait_seconds", step.data_wait_seconds
    for name in ("load_balancing_loss", "regularisation_loss", "router_entropy", "rollout_share"):
        if step.HasField(name):
            yield _NAMES.get(name, name), float(getattr(step, name))
    for index, load in enumerate(step.expert_load):
        yield f"aux_loss/expert_usage_{index}", load


def _of_evaluation(result: Any) -> Iterator[tuple[str, float]]:
    suffix = "_ema" if result.weights == "ema" else ""
    yield f"loss/val/{result.dataset}{suffix}", result.loss
    for each in result.timesteps:
        yield f"loss/val/{result.dataset}{suffix}/t{each.timestep:.0f}", each.loss


_NAMES = {"load_balancing_loss": "aux_loss/total"}
