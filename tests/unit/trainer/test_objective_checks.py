"""What is wrong with a job's objective: ranges, words, and settings that would do nothing."""

import pytest
from google.protobuf.json_format import ParseDict
from reverie.training.v1 import job_pb2
from reverie_hidream.training import objective as hidream
from reverie_trainer.jobs.checks import check_spec, objective
from reverie_trainer.jobs.spec import spec_from_proto

ROLLOUT = {"max_step_offset": 2, "probability": 0.5}


def violations(*, dataset: dict[str, object] | None = None, **optimization: object) -> dict[str, str]:
    job = {
        "name": "cats",
        "datasets": [{"dataset": "cats", **(dataset or {})}],
        "adapter": {"lokr": {}},
        "optimization": {"max_steps": 5, **optimization},
    }
    spec = spec_from_proto(ParseDict(job, job_pb2.TrainingJobSpec()))
    return {violation.field.removeprefix("optimization."): violation.description for violation in check_spec(spec)}


def rollout(**changes: object) -> dict[str, str]:
    return violations(scheduled_sampling={**ROLLOUT, **changes})


@pytest.mark.parametrize(
    "found",
    [
        violations(timestep_sampling="uniform"),
        violations(timestep_sampling="beta", flow_beta_schedule_alpha=3, flow_beta_schedule_beta=1),
        violations(timestep_sampling="custom", flow_custom_timesteps=[0, 0.5, 1], flow_timesteps_mode="round-robin"),
        violations(timestep_sampling="mixflow", mixflow_gamma=0.4),
        violations(flow_schedule_auto_shift=True),
        violations(loss_type="huber", huber_c=0.2, huber_schedule="constant"),
        violations(input_perturbation=0.1, input_perturbation_steps=100, offset_noise=0.05),
        violations(use_load_balancing_loss=True, load_balancing_loss_weight=0.1),
        rollout(),
        rollout(probability=0, ramp_steps=100, prob_end=0.3, ramp_shape="cosine", start_step=4),
        # Roll-outs walk along the shifted schedule even here.
        violations(timestep_sampling="fast", flow_schedule_shift=2, scheduled_sampling=ROLLOUT),
        rollout(probability=0, prob_start=0.1, ramp_steps=10, start_step=100),
        rollout(sampler="heun", strategy="biased_late", reflexflow={"beta1": 1.0}),
    ],
)
def test_takes_everything_that_works(found: dict[str, str]) -> None:
    assert found == {}


@pytest.mark.parametrize(
    ("found", "field", "words"),
    [
        (violations(timestep_sampling="sigmoidal"), "timestep_sampling", "did you mean 'sigmoid'"),
        (violations(timestep_sampling="custom"), "flow_custom_timesteps", "no values"),
        (
            violations(timestep_sampling="custom", flow_custom_timesteps=[1, 1001]),
            "flow_custom_timesteps[1]",
            "at most 1000",
        ),
        (violations(flow_custom_timesteps=[0.5]), "flow_custom_timesteps", "set that to 'custom'"),
        (violations(flow_timesteps_mode="round-robin"), "flow_timesteps_mode", "'sigmoid'"),
        (violations(flow_beta_schedule_alpha=3), "flow_beta_schedule_alpha", "set that to 'beta'"),
        (
            violations(timestep_sampling="beta", flow_beta_schedule_beta=0),
            "flow_beta_schedule_beta",
            "above 0",
        ),
        (violations(timestep_sampling="uniform", flow_sigmoid_scale=0.5), "flow_sigmoid_scale", "'uniform'"),
        (violations(mixflow_gamma=0.5), "mixflow_gamma", "set that to 'mixflow'"),
        (violations(timestep_sampling="mixflow", mixflow_gamma=1.5), "mixflow_gamma", "at most 1"),
        (violations(flow_schedule_shift=0), "flow_schedule_shift", "above 0"),
        (violations(flow_schedule_auto_shift=True, flow_schedule_shift=2), "flow_schedule_shift", "takes its place"),
        (violations(timestep_sampling="fast", flow_schedule_shift=2), "flow_schedule_shift", "not shifted"),
        (
            violations(timestep_sampling="custom", flow_custom_timesteps=[0.5], flow_schedule_auto_shift=True),
            "flow_schedule_auto_shift",
            "choose another mode",
        ),
        (violations(loss_type="huger"), "loss_type", "did you mean 'huber'"),
        (violations(huber_c=0.2), "huber_c", "loss_type is 'l2'"),
        (violations(loss_type="huber", huber_c=0), "huber_c", "above 0"),
        (violations(loss_type="huber", huber_schedule="snrs"), "huber_schedule", "did you mean 'snr'"),
        (violations(input_perturbation=-0.1), "input_perturbation", "at least 0"),
        (violations(input_perturbation_steps=10), "input_perturbation_steps", "input_perturbation is 0"),
        (violations(offset_noise=-0.1), "offset_noise", "at least 0"),
        (violations(load_balancing_loss_weight=0.1), "load_balancing_loss_weight", "set that to true"),
        (
            violations(use_load_balancing_loss=True, load_balancing_loss_weight=0),
            "load_balancing_loss_weight",
            "above 0",
        ),
        (violations(masked_loss_probability=0.5), "masked_loss_probability", "mask_type 'segmentation'"),
        (violations(masked_loss_normalise_area=True), "masked_loss_normalise_area", "no dataset has a mask_type"),
        (
            violations(timestep_sampling="uniform", dataset={"timestep_sampling_offset": 0.5}),
            "datasets[0].timestep_sampling_offset",
            "'sigmoid'",
        ),
        (violations(scheduled_sampling={"probability": 0.5}), "scheduled_sampling.max_step_offset", "1 to 10"),
        (rollout(max_step_offset=11), "scheduled_sampling.max_step_offset", "lower"),
        (rollout(probability=1.5), "scheduled_sampling.probability", "at most 1"),
        (rollout(probability=0), "scheduled_sampling.probability", "rolls nothing out"),
        (rollout(ramp_steps=10), "scheduled_sampling.probability", "prob_start to prob_end"),
        (rollout(prob_end=0.7), "scheduled_sampling.prob_end", "ramp_steps is 0"),
        (rollout(start_step=7), "scheduled_sampling.start_step", "ramp_steps is 0"),
        (
            rollout(probability=0, ramp_steps=10, prob_end=0),
            "scheduled_sampling.prob_end",
            "rolls nothing out",
        ),
        (
            rollout(probability=0, ramp_steps=10, start_step=5),
            "scheduled_sampling.start_step",
            "after the last of max_steps 5",
        ),
        (rollout(reflexflow={"beta1": 0, "beta2": 0}), "scheduled_sampling.reflexflow", "raise one of them"),
        (rollout(strategy="early"), "scheduled_sampling.strategy", "did you mean 'biased_early'"),
        (rollout(sampler="unipc"), "scheduled_sampling.sampler", "euler, heun"),
        (rollout(num_inference_steps=3), "scheduled_sampling.num_inference_steps", "4 to 200"),
        (rollout(reflexflow={"alpha": -1}), "scheduled_sampling.reflexflow.alpha", "at least 0"),
        (violations(timestep_sampling="mixflow", scheduled_sampling=ROLLOUT), "scheduled_sampling", "mixflow"),
    ],
)
def test_refuses_with_the_remedy(found: dict[str, str], field: str, words: str) -> None:
    assert words in found.get(field, f"not refused; {found}")


def test_masks_may_be_weighed_where_a_dataset_has_them() -> None:
    found = violations(
        dataset={"mask_type": "segmentation"}, masked_loss_probability=0.5, masked_loss_normalise_area=True
    )
    assert not found.keys() & {"masked_loss_probability", "masked_loss_normalise_area"}


def test_the_words_are_those_that_the_objective_knows() -> None:
    names = (
        "TIMESTEP_SAMPLINGS",
        "CUSTOM_ORDERS",
        "LOSS_TYPES",
        "HUBER_SCHEDULES",
        "RAMP_SHAPES",
        "ROLLOUT_STRATEGIES",
        "ROLLOUT_SAMPLERS",
    )
    assert [getattr(objective, name) for name in names] == [getattr(hidream, name) for name in names]
