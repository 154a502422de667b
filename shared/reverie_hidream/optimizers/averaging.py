"""Schedule-free optimisers train at one point and are worth using at another, the average of where they have been."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Hold the averaged weights in the parameters, to export or to measure them; others are left as they are.

    Training goes on with the weights of before, to the last bit, however often and whenever this was done: the
    library's way back is an interpolation, which rounds, so that a job with more pictures would train differently.
    """
    switch: Any = optimizer
    if not is_schedule_free(optimizer):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    switch.eval()
    try:
        yield
    finally:
        switch.train()
        with torch.no_grad():
            for parameter, weights in zip(parameters, before, strict=True):
                parameter.copy_(weights)


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether training and averaged weights differ."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
