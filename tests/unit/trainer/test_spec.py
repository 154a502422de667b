"""The domain form of a job: defaults as the contract states them, and nothing lost on the way."""

from collections.abc import Mapping

import pytest
from google.protobuf.json_format import ParseDict
from reverie.training.v1 import job_pb2
from reverie_trainer.jobs.spec import LokrAdapter, LokrOverrides, spec_from_proto, spec_to_proto

MINIMAL: Mapping[str, object] = {
    "name": "cats",
    "datasets": [{"dataset": "cats"}],
    "adapter": {"lokr": {}},
    "optimization": {"max_steps": 5},
}

FULL = {
    "name": "cats",
    "model": {"flavour": "dev", "base_precision": "int8-quanto", "mixed_precision": "no"},
    "datasets": [
        {
            "dataset": "cats",
            "repeats": 3,
            "resolution": 512,
            "resolution_type": "pixel",
            "crop": True,
            "crop_style": "random",
            "instance_prompt": "",
        },
        {"dataset": "dogs"},
    ],
    "adapter": {
        "lokr": {
            "factor": -1,
            "linear_dim": 8,
            "linear_alpha": 0.5,
            "multiplier": 0.25,
            "full_matrix": False,
            "use_scalar": True,
            "decompose_both": True,
            "apply_preset": {
                "target_module": ["Attention", "FeedForward"],
                "module_algo_map": {"FeedForward": {"factor": 8}},
                "name_algo_map": {"*ff_t*": {"full_matrix": True}, "*attn*": {}},
                "use_fnmatch": True,
            },
        }
    },
    "optimization": {"max_steps": 5, "optimizer": "optimi-lion", "weight_decay": 0.0, "max_grad_norm": 0.0},
    "checkpoints": {"every_steps": 0, "keep": 0},
    "validation": {
        "every_steps": 0,
        "prompts": [{"name": "cat", "prompt": "a cat"}],
        "resolutions": ["256x256", "128x256"],
        "negative_prompt": "dog",
        "seed": "7",
        "adapter_strength": 0.0,
    },
    "seed": "0",
    "trigger_words": ["sks"],
}


def parse(record: Mapping[str, object]) -> job_pb2.TrainingJobSpec:
    return ParseDict(dict(record), job_pb2.TrainingJobSpec())


def test_defaults_are_those_of_the_contract() -> None:
    spec = spec_from_proto(parse(MINIMAL))
    assert (spec.seed, spec.validation) == (42, None)
    assert (spec.model.flavour, spec.model.base_precision, spec.model.mixed_precision) == ("full", "no_change", "bf16")
    assert (spec.datasets[0].resolution, spec.datasets[0].resolution_type) == (1024, "pixel_area")
    assert spec.datasets[0].instance_prompt is None
    assert (spec.checkpoints.every_steps, spec.checkpoints.keep) == (500, 5)
    optimization = spec.optimization
    assert (optimization.learning_rate, optimization.weight_decay) == (1e-4, 0.01)
    assert (optimization.max_grad_norm, optimization.grad_clip_method) == (2.0, "value")
    assert (optimization.flow_schedule_shift, optimization.caption_dropout_probability) == (3.0, 0.1)
    assert optimization.gradient_checkpointing
    assert isinstance(spec.adapter, LokrAdapter)
    assert (spec.adapter.factor, spec.adapter.linear_dim, spec.adapter.full_matrix) == (16, 16384, True)
    assert spec.adapter.apply_preset.target_module == ("Attention",)


def test_every_default_is_filled_in_on_the_way_back() -> None:
    filled = spec_to_proto(spec_from_proto(parse(MINIMAL)))
    assert filled.optimization.HasField("learning_rate")
    assert filled.model.HasField("base_precision")
    assert filled.adapter.lokr.apply_preset.target_module == ["Attention"]
    assert not filled.HasField("validation")
    assert not filled.datasets[0].HasField("instance_prompt")


def test_filling_in_twice_changes_nothing() -> None:
    once = spec_to_proto(spec_from_proto(parse(FULL)))
    assert spec_to_proto(spec_from_proto(once)) == once


def test_everything_that_was_given_comes_back() -> None:
    given = parse(FULL)
    filled = spec_to_proto(spec_from_proto(given))
    merged = job_pb2.DatasetSpec()
    merged.CopyFrom(filled.datasets[0])
    merged.MergeFrom(given.datasets[0])
    assert merged == filled.datasets[0]
    assert filled.adapter == given.adapter or filled.adapter.lokr.apply_preset == given.adapter.lokr.apply_preset
    assert filled.seed == 0
    assert filled.validation.seed == 7
    assert filled.validation.adapter_strength == 0.0
    assert filled.validation.resolutions == ["256x256", "128x256"]
    assert filled.optimization.weight_decay == 0.0
    assert filled.checkpoints.HasField("keep")


def test_weight_decay_default_is_the_optimizers() -> None:
    lion = parse({**MINIMAL, "optimization": {"max_steps": 5, "optimizer": "optimi-lion"}})
    assert spec_from_proto(lion).optimization.weight_decay == 0.0


def test_validation_seed_defaults_to_the_jobs() -> None:
    spec = spec_from_proto(parse({**MINIMAL, "seed": "9", "validation": {"prompts": [{"name": "a", "prompt": ""}]}}))
    assert spec.validation is not None
    assert spec.validation.seed == 9


def test_preset_without_classes_selects_by_name_only() -> None:
    spec = spec_from_proto(parse({**MINIMAL, "adapter": {"lokr": {"apply_preset": {"name_algo_map": {"*attn*": {}}}}}}))
    assert isinstance(spec.adapter, LokrAdapter)
    assert spec.adapter.apply_preset.target_module == ()
    assert spec.adapter.apply_preset.name_algo_map == {"*attn*": LokrOverrides()}


@pytest.mark.parametrize("field", ["factor", "linear_dim", "full_matrix"])
def test_override_that_is_not_given_stays_open(field: str) -> None:
    spec = spec_from_proto(parse(FULL))
    assert isinstance(spec.adapter, LokrAdapter)
    assert getattr(spec.adapter.apply_preset.name_algo_map["*attn*"], field) is None
