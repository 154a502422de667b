"""embedding_storage: the words that are taken, and the refusal of others."""

import pytest
from reverie_trainer.jobs.checks.storage import check_storage


@pytest.mark.parametrize("storage", ["exact", "compact", "on_demand"])
def test_takes_every_policy(storage: str) -> None:
    assert not list(check_storage(storage))


def test_refuses_another_word_with_the_nearest() -> None:
    (violation,) = check_storage("on-demand")
    assert violation.field == "embedding_storage"
    assert "exact, compact, on_demand" in violation.description
    assert "did you mean 'on_demand'?" in violation.description
