"""Building an optimiser by its name (spec 5.4).

A library is imported when an optimiser of it is built: bitsandbytes and torchao take seconds to load, and a machine
that only measures the model has none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from reverie_common.optimizer_catalogue import OptionValue, find_optimizer, parse_options

logger = logging.getLogger(__name__)

Parameters: TypeAlias = Sequence[torch.nn.Parameter]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """What every optimiser is built with."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float] | None
    """None for optimisers that have none."""
    options: Mapping[str, OptionValue]
    """Those that were given, defaults excepted."""
    seed: int
    first_index: int
    """Index of the first parameter among all of the adapter's."""

    @property
    def common(self) -> dict[str, Any]:
        """What most libraries take by the same names."""
        return {"lr": self.learning_rate, "weight_decay": self.weight_decay, "betas": self.betas, **self.options}


def build_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    options: Mapping[str, str] | None = None,
    seed: int = 0,
    first_index: int = 0,
) -> torch.optim.Optimizer:
    """An optimiser over an adapter's parameters, ready to take a step.

    Args:
        name: of `optimizer_catalogue.CATALOGUE`.
        parameters: of the dtype that `parameter_dtype` names.
        learning_rate: of the first step; the loop sets it with `set_learning_rate`.
        weight_decay, beta1, beta2: None is the optimiser's own.
        options: settings by name, as text.
        seed: decides the rounding of `adamw_bf16`; nothing else is random.
        first_index: index of the first parameter among all of the adapter's, where they are split up.

    Raises:
        ValueError: unknown name, setting or value, or parameters of another dtype.
    """
    entry = find_optimizer(name)
    betas = None
    if entry.betas is not None:
        betas = (
            entry.betas[0] if beta1 is None else beta1,
            entry.betas[1] if beta2 is None else beta2,
        )
    elif beta1 is not None or beta2 is not None:
        raise ValueError(f"{name} has no beta1 and beta2; leave them out")
    hyperparameters = Hyperparameters(
        learning_rate=learning_rate,
        weight_decay=entry.weight_decay if weight_decay is None else weight_decay,
        betas=betas,
        options=parse_options(name, options or {}),
        seed=seed,
        first_index=first_index,
    )
    optimizer = _BUILDERS[name](list(parameters), hyperparameters)
    if entry.is_schedule_free:
        begin: Any = optimizer
        begin.train()
    return optimizer


def parameter_dtype(name: str) -> torch.dtype:
    """What an adapter's parameters are held in for this optimiser.

    Raises:
        UnknownOptimizerError: there is no such optimiser.
    """
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[find_optimizer(name).dtype]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def _adamw(parameters: Parameters, given: Hyperparameters) -> torch.optim.Optimizer:
    # One kernel over all parameters; the looped default takes longer than a tiny model's backward pass.
    return torch.optim.AdamW(parameters, **given.common, fused=True)


def _optimi(class_name: str, parameters: Parameters, given: Hyperparameters) -> torch.optim.Optimizer:
    import optimi

    settings = given.common
    if given.betas is None:
        del settings["betas"]
    if class_name == "Adan":
        settings["betas"] = (*settings["betas"], settings.pop("beta3", 0.99))
    # Given, not left to be found out at the first step: a resumed optimiser starts with its state already there.
    settings["kahan_sum"] = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in parameters)
    optimizer: torch.optim.Optimizer = getattr(optimi, class_name)(parameters, **settings, foreach=False, triton=False)
    # Set here, as optimi's constructor warns that foreach gives way to Triton, which a CPU does not have: one kernel
    # over hundreds of small tensors instead of four for each.
    for group in optimizer.param_groups:
        group["foreach"] = True
    return optimizer


def _bitsandbytes(class_name: str, parameters: Parameters, given: Hyperparameters) -> torch.optim.Optimizer:
    import bitsandbytes.optim

    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, class_name)(parameters, **given.common)
    # Said in the docs: bitsandbytes would warn that it pages nothing out of a CPU's memory.
    optimizer._cpu_paged_warned = True  # type: ignore[attr-defined]  # bitsandbytes' own
    return optimizer


def _ademamix(class_name: str, parameters: Parameters, given: Hyperparameters) -> torch.optim.Optimizer:
    options = dict(given.options)
    settings = {
        "betas": (*(given.betas or ()), options.pop("beta3", 0.9999)),
        "t_alpha": options.pop("t_alpha", 0) or None,
        "t_beta3": options.pop("t_beta3", 0) or None,
    }
    import bitsandbytes.optim

    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, class_name)(
        parameters, lr=given.learning_rate, weight_decay=given.weight_decay, **settings, **options
    )
    return optimizer


def _prodigy(parameters: Parameters, given: Hyperparameters) -> torch.optim.Optimizer:
    from prodigyplus import ProdigyPlusScheduleFree

    class Prodigy(ProdigyPlusScheduleFree):  # type: ignore[misc]  # prodigyplus is untyped
        def log(self, message: str) -> None:
            logger.info("prodigy: %s", message)

    settings = given.common
    settings["beta3"] = settings.pop("beta3", 0.0) or None
    return Prodigy(parameters, **settings, split_groups=False)


def _schedule_free(class_name: str, parameters: Parameters, given: Hyperparameters) -> torch.optim.Optimizer:
    import schedulefree

    optimizer: torch.optim.Optimizer = getattr(schedulefree, class_name)(parameters, **given.common)
    return optimizer


def _adamw_bf16(parameters: Parameters, given: Hyperparameters) -> torch.optim.Optimizer:
    from reverie_hidream.optimizers.rounding import StochasticAdamW

    for parameter in parameters:
        if parameter.dtype is not torch.bfloat16:
            raise ValueError(
                f"adamw_bf16 rounds bfloat16 weights, a parameter is {parameter.dtype}; attach the adapter in bfloat16"
            )
    settings = {"eps": 1e-6, **given.common}
    return StochasticAdamW(parameters, seed=given.seed, first_index=given.first_index, **settings)


def _torchao(class_name: str, parameters: Parameters, given: Hyperparameters) -> torch.optim.Optimizer:
    from reverie_hidream.optimizers import rounding

    optimizer: torch.optim.Optimizer = getattr(rounding, class_name)(parameters, **given.common)
    return optimizer


def _soap(parameters: Parameters, given: Hyperparameters) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    optimizer: torch.optim.Optimizer = SOAP(parameters, **given.common)
    return optimizer


def _muon(parameters: Parameters, given: Hyperparameters) -> torch.optim.Optimizer:
    from pytorch_optimizer import Muon

    groups = [
        {"params": chosen, "use_muon": is_matrix}
        for is_matrix in (True, False)
        if (chosen := [parameter for parameter in parameters if (parameter.ndim >= 2) is is_matrix])
    ]
    settings: dict[str, Any] = {
        "lr": given.learning_rate,
        "adamw_lr": given.learning_rate,
        "weight_decay": given.weight_decay,
        "adamw_wd": given.weight_decay,
        # Orthogonal steps of the size of AdamW's, so that one learning rate is right for both groups.
        "use_adjusted_lr": True,
        **given.options,
    }
    optimizer: torch.optim.Optimizer = Muon(groups, **settings)
    return optimizer


_BUILDERS: Mapping[str, Callable[[Parameters, Hyperparameters], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "torch-adamw": _adamw,
    "optimi-lion": partial(_optimi, "Lion"),
    "optimi-adamw": partial(_optimi, "AdamW"),
    "optimi-stableadamw": partial(_optimi, "StableAdamW"),
    "optimi-adan": partial(_optimi, "Adan"),
    "optimi-radam": partial(_optimi, "RAdam"),
    "optimi-ranger": partial(_optimi, "Ranger"),
    "optimi-sgd": partial(_optimi, "SGD"),
    "bnb-adamw": partial(_bitsandbytes, "AdamW"),
    "bnb-adamw8bit": partial(_bitsandbytes, "AdamW8bit"),
    "bnb-adamw-paged": partial(_bitsandbytes, "PagedAdamW"),
    "bnb-adamw8bit-paged": partial(_bitsandbytes, "PagedAdamW8bit"),
    "bnb-lion": partial(_bitsandbytes, "Lion"),
    "bnb-lion8bit": partial(_bitsandbytes, "Lion8bit"),
    "bnb-lion-paged": partial(_bitsandbytes, "PagedLion"),
    "bnb-lion8bit-paged": partial(_bitsandbytes, "PagedLion8bit"),
    "bnb-ademamix": partial(_ademamix, "AdEMAMix"),
    "bnb-ademamix8bit": partial(_ademamix, "AdEMAMix8bit"),
    "prodigy": _prodigy,
    "adamw_schedulefree": partial(_schedule_free, "AdamWScheduleFree"),
    "adamw_schedulefree+no_kahan": partial(_schedule_free, "AdamWScheduleFree"),
    "radam_schedulefree": partial(_schedule_free, "RAdamScheduleFree"),
    "adamw_bf16": _adamw_bf16,
    "ao-adamw8bit": partial(_torchao, "EagerAdamW8bit"),
    "ao-adamw4bit": partial(_torchao, "EagerAdamW4bit"),
    "ao-adamwfp8": partial(_torchao, "EagerAdamWFp8"),
    "soap": _soap,
    "muon": _muon,
}
