"""What may be said of noise levels, losses and roll-outs; a setting that would do nothing is refused, not ignored."""

from collections.abc import Iterator

from reverie_common.errors import FieldViolation

from reverie_trainer.jobs.checks.rules import between, one_of, positive, real, violation
from reverie_trainer.jobs.spec import JobSpec, Optimization, ScheduledSampling

TIMESTEP_SAMPLINGS = ("sigmoid", "uniform", "beta", "fast", "custom", "mixflow")
CUSTOM_ORDERS = ("random", "round-robin")
LOSS_TYPES = ("l2", "huber", "smooth_l1")
HUBER_SCHEDULES = ("snr", "exponential", "constant")
RAMP_SHAPES = ("linear", "cosine")
ROLLOUT_STRATEGIES = ("uniform", "biased_early", "biased_late")
ROLLOUT_SAMPLERS = ("euler", "heun")

_DEFAULTS = Optimization()
_MODE_OF_FIELD = {
    "flow_sigmoid_scale": "sigmoid",
    "flow_beta_schedule_alpha": "beta",
    "flow_beta_schedule_beta": "beta",
    "flow_custom_timesteps": "custom",
    "flow_timesteps_mode": "custom",
    "mixflow_gamma": "mixflow",
}
"""Fields that mean something in one mode of timestep_sampling only."""

_UNSHIFTED = ("fast", "custom")
"""Modes whose noise levels are taken as they are."""

_RAMP_FIELDS = ("prob_start", "prob_end", "ramp_shape", "start_step")


def check_objective(spec: JobSpec) -> Iterator[FieldViolation]:
    """Yield what is wrong with the objective of a job."""
    optimization = spec.optimization
    yield from _noise_levels(optimization)
    yield from _shift(spec)
    yield from _loss(optimization)
    yield from _noise(optimization)
    yield from _balance(optimization)
    yield from _masks(spec)
    yield from _offsets(spec)
    if optimization.scheduled_sampling is not None:
        yield from _scheduled_sampling(optimization, optimization.scheduled_sampling)
        yield from _never_rolled_out(optimization, optimization.scheduled_sampling)


def _noise_levels(optimization: Optimization) -> Iterator[FieldViolation]:
    mode = optimization.timestep_sampling
    yield from one_of("optimization.timestep_sampling", mode, TIMESTEP_SAMPLINGS)
    yield from positive("optimization.flow_sigmoid_scale", optimization.flow_sigmoid_scale)
    yield from positive("optimization.flow_beta_schedule_alpha", optimization.flow_beta_schedule_alpha)
    yield from positive("optimization.flow_beta_schedule_beta", optimization.flow_beta_schedule_beta)
    yield from one_of("optimization.flow_timesteps_mode", optimization.flow_timesteps_mode, CUSTOM_ORDERS)
    yield from real("optimization.mixflow_gamma", optimization.mixflow_gamma, at_least=0.0, at_most=1.0)
    for index, value in enumerate(optimization.flow_custom_timesteps):
        yield from real(f"optimization.flow_custom_timesteps[{index}]", value, at_least=0.0, at_most=1000.0)
    if mode == "custom" and not optimization.flow_custom_timesteps:
        yield violation(
            "optimization.flow_custom_timesteps",
            "timestep_sampling is 'custom' and there are no values; give sigmas in 0 to 1 or timesteps in 0 to 1000",
        )
    for name, needed in _MODE_OF_FIELD.items():
        if mode in TIMESTEP_SAMPLINGS and mode != needed and _is_changed(optimization, name):
            yield _useless(name, f"timestep_sampling is {mode!r}", f"set that to {needed!r}")


def _shift(spec: JobSpec) -> Iterator[FieldViolation]:
    optimization = spec.optimization
    yield from positive("optimization.flow_schedule_shift", optimization.flow_schedule_shift)
    # Roll-outs and the evaluation loss walk along the shifted schedule, however the noise levels are drawn.
    if (
        optimization.timestep_sampling in _UNSHIFTED
        and optimization.scheduled_sampling is None
        and spec.evaluation is None
    ):
        for name in ("flow_schedule_shift", "flow_schedule_auto_shift"):
            if _is_changed(optimization, name):
                why = f"timestep_sampling is {optimization.timestep_sampling!r}, which is not shifted"
                yield _useless(name, why, "choose another mode")
    if optimization.flow_schedule_auto_shift and _is_changed(optimization, "flow_schedule_shift"):
        yield _useless("flow_schedule_shift", "flow_schedule_auto_shift takes its place", "switch that off")


def _loss(optimization: Optimization) -> Iterator[FieldViolation]:
    yield from one_of("optimization.loss_type", optimization.loss_type, LOSS_TYPES)
    yield from real("optimization.huber_c", optimization.huber_c, above=0.0, at_most=1000.0)
    yield from one_of("optimization.huber_schedule", optimization.huber_schedule, HUBER_SCHEDULES)
    for name in ("huber_c", "huber_schedule"):
        if optimization.loss_type == "l2" and _is_changed(optimization, name):
            yield _useless(name, "loss_type is 'l2'", "set that to 'huber' or 'smooth_l1'")


def _noise(optimization: Optimization) -> Iterator[FieldViolation]:
    yield from real("optimization.input_perturbation", optimization.input_perturbation, at_least=0.0, at_most=10.0)
    yield from between(
        "optimization.input_perturbation_steps", optimization.input_perturbation_steps, 0, 1_000_000, "optimiser steps"
    )
    yield from real("optimization.offset_noise", optimization.offset_noise, at_least=0.0, at_most=10.0)
    if optimization.input_perturbation_steps and not optimization.input_perturbation:
        yield _useless("input_perturbation_steps", "input_perturbation is 0", "set that above 0")


def _balance(optimization: Optimization) -> Iterator[FieldViolation]:
    weight = optimization.load_balancing_loss_weight
    yield from real("optimization.load_balancing_loss_weight", weight, above=0.0, at_most=1000.0)
    if not optimization.use_load_balancing_loss and _is_changed(optimization, "load_balancing_loss_weight"):
        yield _useless("load_balancing_loss_weight", "use_load_balancing_loss is false", "set that to true")


def _masks(spec: JobSpec) -> Iterator[FieldViolation]:
    optimization = spec.optimization
    probability = optimization.masked_loss_probability
    yield from real("optimization.masked_loss_probability", probability, at_least=0.0, at_most=1.0)
    mask_types = {dataset.mask_type for dataset in spec.datasets}
    if _is_changed(optimization, "masked_loss_probability") and "segmentation" not in mask_types:
        yield _useless(
            "masked_loss_probability", "no dataset has mask_type 'segmentation'", "set that for the dataset with masks"
        )
    if optimization.masked_loss_normalise_area and not mask_types & {"mask", "segmentation"}:
        yield _useless("masked_loss_normalise_area", "no dataset has a mask_type", "set it for the dataset with masks")


def _offsets(spec: JobSpec) -> Iterator[FieldViolation]:
    mode = spec.optimization.timestep_sampling
    for index, dataset in enumerate(spec.datasets):
        if dataset.timestep_sampling_offset and mode in TIMESTEP_SAMPLINGS and mode != "sigmoid":
            yield violation(
                f"datasets[{index}].timestep_sampling_offset",
                f"{dataset.timestep_sampling_offset:g} would do nothing: it counts for timestep_sampling 'sigmoid', "
                f"which is {mode!r}; leave it out, or set that to 'sigmoid'",
            )


def _scheduled_sampling(optimization: Optimization, sampling: ScheduledSampling) -> Iterator[FieldViolation]:
    path = "optimization.scheduled_sampling"
    yield from between(f"{path}.max_step_offset", sampling.max_step_offset, 1, 10, "steps")
    for name in ("probability", "prob_start", "prob_end"):
        yield from real(f"{path}.{name}", getattr(sampling, name), at_least=0.0, at_most=1.0)
    yield from between(f"{path}.ramp_steps", sampling.ramp_steps, 0, 1_000_000, "optimiser steps")
    yield from between(f"{path}.start_step", sampling.start_step, 0, 1_000_000, "optimiser steps")
    yield from one_of(f"{path}.ramp_shape", sampling.ramp_shape, RAMP_SHAPES)
    yield from one_of(f"{path}.strategy", sampling.strategy, ROLLOUT_STRATEGIES)
    yield from one_of(f"{path}.sampler", sampling.sampler, ROLLOUT_SAMPLERS)
    yield from between(f"{path}.num_inference_steps", sampling.num_inference_steps, 4, 200, "steps")
    yield from _ramp(sampling, path)
    if sampling.reflexflow is not None:
        for name in ("alpha", "beta1", "beta2"):
            value = getattr(sampling.reflexflow, name)
            yield from real(f"{path}.reflexflow.{name}", value, at_least=0.0, at_most=1000.0)
    if optimization.timestep_sampling == "mixflow":
        yield violation(path, "mixflow makes the input its own way; leave one of both out")


def _ramp(sampling: ScheduledSampling, path: str) -> Iterator[FieldViolation]:
    default = ScheduledSampling()
    if sampling.ramp_steps:
        if sampling.probability:
            yield _useless(
                "scheduled_sampling.probability", "ramp_steps takes prob_start to prob_end", "set ramp_steps to 0"
            )
        if not max(sampling.prob_start, sampling.prob_end) > 0:
            yield violation(f"{path}.prob_end", "0 to 0 rolls nothing out; raise it, or leave scheduled_sampling out")
        return
    if not sampling.probability:
        yield violation(
            f"{path}.probability", "0 without a ramp rolls nothing out; raise it, or give ramp_steps and prob_end"
        )
    for name in _RAMP_FIELDS:
        if getattr(sampling, name) != getattr(default, name):
            yield _useless(f"scheduled_sampling.{name}", "ramp_steps is 0", "set that above 0")


def _never_rolled_out(optimization: Optimization, sampling: ScheduledSampling) -> Iterator[FieldViolation]:
    """Refuse a ramp that begins at 0 after the last step, and a loss of rolled-out samples that is always 0."""
    if sampling.ramp_steps and not sampling.prob_start and 0 < optimization.max_steps <= sampling.start_step:
        yield _useless(
            "scheduled_sampling.start_step",
            f"the ramp begins at step {sampling.start_step}, after the last of max_steps {optimization.max_steps}",
            "lower it",
        )
    reflexflow = sampling.reflexflow
    if reflexflow is not None and not reflexflow.beta1 and not reflexflow.beta2:
        yield violation(
            "optimization.scheduled_sampling.reflexflow",
            "beta1 and beta2 are both 0, so that rolled-out samples would teach nothing; raise one of them",
        )


def _is_changed(optimization: Optimization, name: str) -> bool:
    return bool(getattr(optimization, name) != getattr(_DEFAULTS, name))


def _useless(name: str, why: str, remedy: str) -> FieldViolation:
    return violation(f"optimization.{name}", f"it would do nothing: {why}; leave it out, or {remedy}")
