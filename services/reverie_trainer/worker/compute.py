"""torch in this process: device, threads, determinism, and what can be imported before there is a job."""

from __future__ import annotations

import importlib
import logging
import os
import warnings

import torch

logger = logging.getLogger(__name__)

_WARM_MODULES = (
    "diffusers.models.transformers.transformer_hidream_image",
    "lycoris",
    "optimi",
    "reverie_hidream.adapters.lokr",
    "reverie_hidream.quantise",
    "reverie_hidream.transformer",
    "reverie_trainer.worker.run",
)


def configure_torch(*, num_threads: int) -> None:
    """Use so many threads (0 is one for each core), and algorithms that give the same bits on every run."""
    torch.set_num_threads(num_threads or len(os.sched_getaffinity(0)))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Some CUDA kernels have no deterministic form: then the job runs all the same, and a warning says so.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Would fill every new tensor; nothing of ours reads memory that it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set on the module


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is `cuda` where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def warm_up() -> None:
    """Import what a job needs and make torch start its threads, so that a waiting worker begins at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=SyntaxWarning)
        for name in _WARM_MODULES:
            importlib.import_module(name)
    weight = torch.ones(64, 64, requires_grad=True)
    (torch.ones(512, 64) @ weight).sum().backward()
