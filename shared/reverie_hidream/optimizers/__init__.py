"""Optimisers, gradient clipping, learning-rate schedules and gradient release of a job (spec 5.4 to 5.6).

Names, defaults and settings are in `reverie_common.optimizer_catalogue`, which is free of torch.
"""

from reverie_common.optimizer_catalogue import (
    CATALOGUE,
    CLIP_METHODS,
    SCHEDULES,
    OptimizerOptionError,
    UnknownOptimizerError,
    find_optimizer,
)

from reverie_hidream.optimizers.averaging import averaged_weights
from reverie_hidream.optimizers.builders import build_optimizer, parameter_dtype, set_learning_rate
from reverie_hidream.optimizers.clipping import clip_gradients, gradient_absmax
from reverie_hidream.optimizers.schedules import learning_rate_at
from reverie_hidream.optimizers.state import load_optimizer_tensors, optimizer_tensors
from reverie_hidream.optimizers.update import (
    AdapterUpdate,
    GradientFigures,
    NonFiniteLossError,
    UpdateSettings,
    build_update,
)

OPTIMIZERS = tuple(CATALOGUE)

__all__ = [
    "AdapterUpdate",
    "CLIP_METHODS",
    "GradientFigures",
    "NonFiniteLossError",
    "OPTIMIZERS",
    "OptimizerOptionError",
    "SCHEDULES",
    "UnknownOptimizerError",
    "UpdateSettings",
    "averaged_weights",
    "build_optimizer",
    "build_update",
    "clip_gradients",
    "find_optimizer",
    "gradient_absmax",
    "learning_rate_at",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "parameter_dtype",
    "set_learning_rate",
]
