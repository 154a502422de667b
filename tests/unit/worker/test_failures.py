"""Which errors end a job, and that each of them names a remedy."""

import pytest
import torch
from reverie_common.errors import (
    IntegrityError,
    InvalidArgumentError,
    NotFoundError,
    StoreAccessError,
    StoreFullError,
    StoreUnavailableError,
)
from reverie_hidream.adapters.config import AdapterMatchesNothingError
from reverie_hidream.training.step import NonFiniteLossError
from reverie_trainer.worker.failures import failure_of
from reverie_trainer.worker.proof import ExportRefutedError, NothingLearntError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NonFiniteLossError("the loss at step 3 is nan"), "NON_FINITE_LOSS"),
        (AdapterMatchesNothingError("nothing"), "ADAPTER_MATCHES_NOTHING"),
        (ExportRefutedError("differs"), "EXPORT_REFUTED"),
        (NothingLearntError("nothing"), "NOTHING_LEARNT"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OUT_OF_MEMORY"),
        (ValueError("optimizer 'x' is unknown"), "JOB_NOT_TRAINABLE"),
        (StoreFullError("full"), "STORE_FULL"),
        (StoreAccessError("denied"), "STORE_ACCESS_DENIED"),
        (IntegrityError("damaged"), "OBJECT_CORRUPT"),
        (NotFoundError("gone"), "NOT_FOUND"),
        (InvalidArgumentError("wrong"), "INVALID_ARGUMENT"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_these_end_the_job_with_a_remedy(error: Exception, reason: str) -> None:
    failure = failure_of(error)
    assert failure is not None
    assert (failure.reason, failure.message) == (reason, str(error))
    assert failure.remedy


@pytest.mark.parametrize("error", [StoreUnavailableError("away"), RuntimeError("a bug"), KeyError("a bug")])
def test_these_are_worth_another_worker(error: Exception) -> None:
    assert failure_of(error) is None
