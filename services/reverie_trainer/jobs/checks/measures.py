"""What may be said of the evaluation and of the checkpoints."""

from collections.abc import Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.rules import between, violation
from reverie_trainer.jobs.spec import Checkpoints, Evaluation, JobSpec

MAX_EPOCHS = 1_000_000


def check_evaluation(spec: JobSpec) -> Iterator[FieldViolation]:
    """Yield what is wrong with the evaluation."""
    has_images = any(choice.role == "evaluation" for choice in spec.datasets)
    if spec.evaluation is None:
        if has_images:
            yield violation(
                "evaluation", "a dataset has the role evaluation, but nothing measures it; add `evaluation: {}`"
            )
        return
    if not has_images:
        yield violation(
            "evaluation", "no dataset has the role evaluation, so there is nothing to measure; add one, or leave it out"
        )
    yield from _numbers(spec.evaluation)


def check_checkpoints(checkpoints: Checkpoints) -> Iterator[FieldViolation]:
    """Yield what is wrong with the checkpoints."""
    yield from between("checkpoints.every_epochs", checkpoints.every_epochs, 0, MAX_EPOCHS, "epochs")


def _numbers(evaluation: Evaluation) -> Iterator[FieldViolation]:
    yield from between("evaluation.every_epochs", evaluation.every_epochs, 0, MAX_EPOCHS, "epochs")
    yield from between("evaluation.num_images", evaluation.num_images, 1, 1000, "images")
    yield from between("evaluation.num_timesteps", evaluation.num_timesteps, 2, 1000, "timesteps")
