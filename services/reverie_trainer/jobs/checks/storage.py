"""What may be said of how embeddings are kept."""

from collections.abc import Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.rules import one_of

EMBEDDING_STORAGES = ("exact", "compact", "on_demand")


def check_storage(embedding_storage: str) -> Iterator[FieldViolation]:
    """Yield what is wrong with the way in which embeddings are kept."""
    yield from one_of("embedding_storage", embedding_storage, EMBEDDING_STORAGES)
