"""What is wrong with a job by itself: every violation at once, as field paths with value, limit and remedy.

What needs more than the job - datasets that exist, modules that an adapter matches - is checked in `admission`.
"""

from collections.abc import Iterator, Sequence

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.adapter import check_adapter
from reverie_trainer.jobs.checks.data import check_datasets
from reverie_trainer.jobs.checks.measures import check_checkpoints, check_evaluation
from reverie_trainer.jobs.checks.model import check_model
from reverie_trainer.jobs.checks.objective import check_objective
from reverie_trainer.jobs.checks.optimization import check_optimization
from reverie_trainer.jobs.checks.optimizers import check_ema
from reverie_trainer.jobs.checks.outlets import check_outlets
from reverie_trainer.jobs.checks.rules import JOB_NAME, MAX_PROMPT_CHARACTERS, name, violation
from reverie_trainer.jobs.checks.storage import check_storage
from reverie_trainer.jobs.checks.validation import check_validation, picture_size
from reverie_trainer.jobs.spec import JobSpec

__all__ = ["MAX_PROMPT_CHARACTERS", "check_dataset_name", "check_spec", "picture_size"]


def check_spec(spec: JobSpec) -> list[FieldViolation]:
    """Return everything that is wrong with a job by itself; an empty list means nothing."""
    return [
        *name("name", spec.name, JOB_NAME, "[a-z0-9-]"),
        *check_model(spec),
        *check_datasets(spec),
        *check_adapter(spec),
        *check_optimization(spec.optimization),
        *check_objective(spec),
        *(check_ema(spec.ema, spec.optimization.max_steps) if spec.ema is not None else ()),
        *(check_validation(spec.validation) if spec.validation is not None else ()),
        *check_evaluation(spec),
        *check_checkpoints(spec.checkpoints),
        *check_outlets(spec),
        *check_storage(spec.embedding_storage),
        *_trigger_words(spec.trigger_words),
    ]


def check_dataset_name(value: str, path: str = "name") -> list[FieldViolation]:
    """Return what is wrong with the name of a dataset."""
    return list(name(path, value, JOB_NAME, "[a-z0-9-]"))


def _trigger_words(words: Sequence[str]) -> Iterator[FieldViolation]:
    for index, word in enumerate(words):
        if not word.strip() or len(word) > 255:
            yield violation(f"trigger_words[{index}]", f"{word[:40]!r} must have 1 to 255 characters")
