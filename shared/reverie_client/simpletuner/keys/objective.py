"""The objective: noise levels, loss, masks, balance of the experts, scheduled sampling (spec 3, 9)."""

from typing import Any

from reverie_client.simpletuner.reading import parse_json
from reverie_client.simpletuner.rules import (
    UNSET,
    Given,
    Option,
    Scope,
    choice,
    custom,
    flag,
    ignored,
    number,
    parse_flag,
    parse_number,
    refused,
    when,
)

MODES = {
    "mixflow_enabled": "mixflow",
    "flow_custom_timesteps": "custom",
    "flow_use_uniform_schedule": "uniform",
    "flow_use_beta_schedule": "beta",
    "flux_fast_schedule": "fast",
}
"""Options that choose how noise levels are drawn; the first that is on decides."""

MODE_FIELD = "optimization.timestep_sampling"
LIVE_BALANCE = "with a live gradient, the mean over layers and the weight once; in SimpleTuner it has no gradient"
SPACING = "roll-out steps have the spacing of inference; SimpleTuner's are a thousandth each"


def timestep_mode(scope: Scope) -> str:
    """How the options say that noise levels are drawn."""
    for name, mode in MODES.items():
        value = scope.value(name)
        if value not in (None, "") if name == "flow_custom_timesteps" else parse_flag(value) is True:
            return mode
    return "sigmoid"


def _mode(name: str, note: str = "") -> Option:
    mode = MODES[name]

    def apply(scope: Scope, given: Given) -> None:
        chosen = timestep_mode(scope)
        if parse_flag(given.value) is not True:
            scope.ignore(given, "it is off")
        elif chosen == mode:
            scope.honour(given, MODE_FIELD, mode, note)
        else:
            scope.ignore(given, f"{chosen} comes before it, in SimpleTuner too")

    return custom(name, apply, "honoured", MODE_FIELD, note or f"`{mode}`")


def _custom(scope: Scope, given: Given) -> None:
    chosen = timestep_mode(scope)
    values = _numbers(given.value)
    if given.value in ("", []):
        scope.ignore(given, "it is empty")
    elif not values:
        scope.refuse(given, "it is no list of numbers", "write them with commas between: 0.9,0.5")
    elif chosen != "custom":
        scope.ignore(given, f"{chosen} comes before it, in SimpleTuner too")
    else:
        scope.draft.put(MODE_FIELD, "custom")
        scope.honour(given, "optimization.flow_custom_timesteps", values)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, str):
        text = value.strip()
        value = parse_json(text, "the list") if text.startswith("[") else text.split(",")
    found = [parse_number(each) for each in value] if isinstance(value, list) else []
    return [] if None in found else [float(each) for each in found if each is not None]


def _is(mode: str) -> Any:
    return lambda scope: timestep_mode(scope) == mode


def _shift(scope: Scope, given: Given) -> None:
    value = parse_number(given.value)
    if value is None:
        scope.refuse(given, "it is not a number")
    elif scope.is_on("flow_schedule_auto_shift"):
        scope.ignore(given, "flow_schedule_auto_shift comes before it, in SimpleTuner too")
    elif value <= 0:
        scope.change(given, "optimization.flow_schedule_auto_shift", True, "0 and less mean the automatic shift")
    else:
        scope.honour(given, "optimization.flow_schedule_shift", float(value))


def _offset_noise(scope: Scope, given: Given) -> None:
    if parse_flag(given.value) is not True:
        scope.ignore(given, "it is off")
        return
    strength = parse_number(scope.value("noise_offset", 0.1)) or 0.1
    scope.change(
        given, "optimization.offset_noise", float(strength), "it works here; SimpleTuner leaves it out for flow models"
    )


def _balance(scope: Scope, given: Given) -> None:
    value = parse_flag(given.value)
    if value is None:
        scope.refuse(given, "it is neither true nor false")
    else:
        reason = LIVE_BALANCE if value else ""
        scope.honour(given, "optimization.use_load_balancing_loss", value, reason)


def _balance_weight(scope: Scope, given: Given) -> None:
    weight = parse_number(given.value)
    if weight is None or weight <= 0:
        scope.refuse(given, "it is not a number above 0", "switch hidream_use_load_balancing_loss off")
    else:
        scope.honour(
            given, "optimization.load_balancing_loss_weight", float(weight), "default 0.01; in SimpleTuner, none"
        )


def _has_segmentation(scope: Scope) -> bool:
    datasets = scope.draft.document.get("datasets") or []
    return any(dataset.get("mask_type") == "segmentation" for dataset in datasets)


def _rolls_out(scope: Scope) -> bool:
    """Whether some sample is ever rolled out."""
    if timestep_mode(scope) == "mixflow" or not parse_number(scope.value("scheduled_sampling_max_step_offset", 0)):
        return False
    names = ("prob_start", "prob_end") if _is_ramped(scope) else ("probability",)
    defaults = {"prob_end": 0.5}
    return any(parse_number(scope.value(f"scheduled_sampling_{name}", defaults.get(name, 0))) for name in names)


def _is_ramped(scope: Scope) -> bool:
    return bool(parse_number(scope.value("scheduled_sampling_ramp_steps", 0)))


def _sampler(scope: Scope, given: Given) -> None:
    if given.value == "euler":
        scope.honour(given, "optimization.scheduled_sampling.sampler", "euler")
    else:
        scope.change(
            given,
            "optimization.scheduled_sampling.sampler",
            "euler",
            "flow models are rolled out by Euler steps, in SimpleTuner too",
        )


def _reflexflow(scope: Scope, given: Given) -> None:
    if parse_flag(given.value) is True:
        field = "optimization.scheduled_sampling.reflexflow"
        scope.honour(given, field, scope.draft.get(field) or {}, "on rolled-out samples alone")
    else:
        scope.ignore(given, "it is off")


def _is_reflexflow(scope: Scope) -> bool:
    return _rolls_out(scope) and scope.is_on("scheduled_sampling_reflexflow")


def _offset(scope: Scope, given: Given) -> None:
    steps = parse_number(given.value, is_whole=True)
    if steps is None or steps < 0:
        scope.refuse(given, "it is not a whole number of 0 or more")
    elif steps == 0:
        scope.ignore(given, "it is off")
    elif timestep_mode(scope) == "mixflow":
        scope.refuse(given, "mixflow_enabled makes the input its own way", "set one of both to off")
    elif not _rolls_out(scope):
        scope.ignore(given, "the probability is 0, so that nothing is rolled out; SimpleTuner adds a loss all the same")
    elif steps > 10:
        scope.refuse(given, "it is above 10 steps of the inference schedule", "the nearest that works is 10")
    else:
        scope.change(given, "optimization.scheduled_sampling.max_step_offset", int(steps), SPACING)


_ROLLOUT = "optimization.scheduled_sampling"

OBJECTIVE: tuple[Option, ...] = (
    custom("flow_schedule_shift", _shift, "honoured", "optimization.flow_schedule_shift"),
    flag("flow_schedule_auto_shift", "optimization.flow_schedule_auto_shift", "the evaluation follows it too"),
    *when(
        _is("sigmoid"),
        "timesteps are drawn in another way",
        (number("flow_sigmoid_scale", "optimization.flow_sigmoid_scale", low=1e-9),),
    ),
    _mode("flow_use_uniform_schedule"),
    _mode("flow_use_beta_schedule"),
    *when(
        _is("beta"),
        "flow_use_beta_schedule is off",
        (
            number("flow_beta_schedule_alpha", "optimization.flow_beta_schedule_alpha", low=1e-9),
            number("flow_beta_schedule_beta", "optimization.flow_beta_schedule_beta", low=1e-9),
        ),
    ),
    _mode("flux_fast_schedule"),
    custom("flow_custom_timesteps", _custom, "honoured", "optimization.flow_custom_timesteps"),
    *when(
        _is("custom"),
        "flow_custom_timesteps is not given",
        (
            choice(
                "flow_timesteps_mode",
                "optimization.flow_timesteps_mode",
                {"fixed-list": "random", "random": "random", "round-robin": "round-robin"},
            ),
        ),
    ),
    _mode("mixflow_enabled"),
    *when(
        _is("mixflow"),
        "mixflow_enabled is off",
        (number("mixflow_gamma", "optimization.mixflow_gamma", low=0.0, high=1.0),),
    ),
    ignored("disable_segmented_timestep_sampling", "it means nothing for flow models, in SimpleTuner too"),
    ignored("snr_gamma", "it means nothing for flow models, in SimpleTuner too"),
    choice("loss_type", "optimization.loss_type", ("l2", "huber", "smooth_l1")),
    *when(
        lambda scope: scope.value("loss_type", "l2") != "l2",
        "loss_type is l2",
        (
            number("huber_c", "optimization.huber_c", low=1e-9),
            choice("huber_schedule", "optimization.huber_schedule", ("snr", "exponential", "constant")),
        ),
    ),
    number("input_perturbation", "optimization.input_perturbation", low=0.0),
    *when(
        lambda scope: bool(parse_number(scope.value("input_perturbation", 0))),
        "input_perturbation is 0",
        (number("input_perturbation_steps", "optimization.input_perturbation_steps", low=0, high=1e6, is_whole=True),),
    ),
    custom(
        "offset_noise",
        _offset_noise,
        "changed",
        "optimization.offset_noise",
        "it works here; SimpleTuner leaves it out for flow models",
    ),
    *when(
        lambda scope: scope.is_on("offset_noise"),
        "offset_noise is off",
        (
            custom(
                "noise_offset",
                lambda scope, given: scope.honour(
                    given, "optimization.offset_noise", UNSET, "it is the strength of offset_noise"
                ),
                "honoured",
                "optimization.offset_noise",
            ),
            refused("noise_offset_probability", "every sample gets the offset", "use 1", off=(1, 1.0, "1", "1.0")),
        ),
    ),
    *when(
        _has_segmentation,
        "no dataset has masks of conditioning_type segmentation",
        (number("masked_loss_probability", "optimization.masked_loss_probability", low=0.0, high=1.0),),
    ),
    number("caption_dropout_probability", "optimization.caption_dropout_probability", low=0.0, high=1.0),
    custom(
        "hidream_use_load_balancing_loss", _balance, "honoured", "optimization.use_load_balancing_loss", LIVE_BALANCE
    ),
    *when(
        lambda scope: scope.is_on("hidream_use_load_balancing_loss"),
        "hidream_use_load_balancing_loss is off",
        (
            custom(
                "hidream_load_balancing_loss_weight",
                _balance_weight,
                "honoured",
                "optimization.load_balancing_loss_weight",
                "default 0.01; without a weight SimpleTuner does nothing",
            ),
        ),
    ),
    custom("scheduled_sampling_max_step_offset", _offset, "changed", f"{_ROLLOUT}.max_step_offset", SPACING),
    *when(
        _rolls_out,
        "nothing is rolled out",
        (
            *when(
                lambda scope: not _is_ramped(scope),
                "scheduled_sampling_ramp_steps takes its place, in SimpleTuner too",
                (number("scheduled_sampling_probability", f"{_ROLLOUT}.probability", low=0.0, high=1.0),),
            ),
            number("scheduled_sampling_ramp_steps", f"{_ROLLOUT}.ramp_steps", low=0, high=1_000_000, is_whole=True),
            *when(
                _is_ramped,
                "scheduled_sampling_ramp_steps is 0",
                (
                    number("scheduled_sampling_prob_start", f"{_ROLLOUT}.prob_start", low=0.0, high=1.0),
                    number("scheduled_sampling_prob_end", f"{_ROLLOUT}.prob_end", low=0.0, high=1.0),
                    choice("scheduled_sampling_ramp_shape", f"{_ROLLOUT}.ramp_shape", ("linear", "cosine")),
                    number("scheduled_sampling_start_step", f"{_ROLLOUT}.start_step", low=0, high=1e6, is_whole=True),
                ),
            ),
            choice("scheduled_sampling_strategy", f"{_ROLLOUT}.strategy", ("uniform", "biased_early", "biased_late")),
            custom(
                "scheduled_sampling_sampler",
                _sampler,
                "changed",
                f"{_ROLLOUT}.sampler",
                "euler, as SimpleTuner takes it for flow models whatever is given",
            ),
            ignored("scheduled_sampling_order", "Euler steps have order 1, in SimpleTuner too"),
            custom(
                "scheduled_sampling_reflexflow",
                _reflexflow,
                "honoured",
                f"{_ROLLOUT}.reflexflow",
                "only when it is asked for; SimpleTuner switches it on by itself, and on every sample",
            ),
        ),
    ),
    *when(
        _is_reflexflow,
        "scheduled_sampling_reflexflow is not on",
        (
            number("scheduled_sampling_reflexflow_alpha", f"{_ROLLOUT}.reflexflow.alpha", low=0.0),
            number("scheduled_sampling_reflexflow_beta1", f"{_ROLLOUT}.reflexflow.beta1", low=0.0),
            number("scheduled_sampling_reflexflow_beta2", f"{_ROLLOUT}.reflexflow.beta2", low=0.0),
        ),
    ),
)
