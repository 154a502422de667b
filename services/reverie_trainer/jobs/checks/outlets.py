"""What may be said of trackers, the Hub and webhooks."""

from collections.abc import Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.spec import JobSpec


def check_outlets(_: JobSpec) -> Iterator[FieldViolation]:
    """Yield what is wrong with where a job's results go."""
    yield from ()
