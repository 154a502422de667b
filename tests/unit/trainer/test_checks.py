"""What is wrong with a job by itself: each rule, and all of them at once."""

import pytest
from google.protobuf.json_format import ParseDict
from reverie.training.v1 import job_pb2
from reverie_trainer.jobs.checks import check_dataset_name, check_spec, picture_size
from reverie_trainer.jobs.spec import spec_from_proto

MINIMAL: dict[str, object] = {
    "name": "cats",
    "datasets": [{"dataset": "cats"}],
    "adapter": {"lokr": {}},
    "optimization": {"max_steps": 5},
}
PROMPT = {"name": "cat", "prompt": "a cat"}


def violations(**changes: object) -> dict[str, str]:
    spec = spec_from_proto(ParseDict({**MINIMAL, **changes}, job_pb2.TrainingJobSpec()))
    return {violation.field: violation.description for violation in check_spec(spec)}


def optimization(**changes: object) -> dict[str, str]:
    return violations(optimization={"max_steps": 5, **changes})


def validation(**changes: object) -> dict[str, str]:
    return violations(validation={"prompts": [PROMPT], **changes})


def lokr(**changes: object) -> dict[str, str]:
    return violations(adapter={"lokr": changes})


def test_minimal_job_is_right() -> None:
    assert violations() == {}


@pytest.mark.parametrize(
    ("found", "field", "words"),
    [
        (violations(name=""), "name", "missing"),
        (violations(name="My Cat"), "name", "'My Cat'"),
        (violations(name="c" * 64), "name", "{1,63}"),
        (violations(model={"flavour": "ful"}), "model.flavour", "did you mean 'full'"),
        (violations(model={"base_precision": "int8"}), "model.base_precision", "did you mean 'int8-quanto'"),
        (violations(model={"mixed_precision": "fp16"}), "model.mixed_precision", "bf16"),
        (violations(datasets=[]), "datasets", "CreateDataset"),
        (violations(datasets=[{"dataset": ""}]), "datasets[0].dataset", "missing"),
        (violations(datasets=[{"dataset": "a", "resolution": 0}]), "datasets[0].resolution", "0 is outside 64 to 4096"),
        (violations(datasets=[{"dataset": "a", "resolution": 5000}]), "datasets[0].resolution", "lower"),
        (violations(datasets=[{"dataset": "a", "repeats": 2_000_000}]), "datasets[0].repeats", "1000000"),
        (
            violations(datasets=[{"dataset": "a", "resolution_type": "pixels"}]),
            "datasets[0].resolution_type",
            "did you mean 'pixel'",
        ),
        (violations(datasets=[{"dataset": "a", "crop_style": "centre"}]), "datasets[0].crop_style", "'center'"),
        (
            violations(datasets=[{"dataset": "a", "instance_prompt": "x" * 10_000}]),
            "datasets[0].instance_prompt",
            "10000 characters are above 8192",
        ),
        (violations(adapter={}), "adapter", "adapter.lokr"),
        (lokr(factor=0), "adapter.lokr.factor", "-1"),
        (lokr(linear_dim=0), "adapter.lokr.linear_dim", "raise"),
        (lokr(linear_alpha=0), "adapter.lokr.linear_alpha", "above 0"),
        (lokr(multiplier="NaN"), "adapter.lokr.multiplier", "nan"),
        (
            lokr(apply_preset={"module_algo_map": {"Attention": {"factor": -2}}}),
            "adapter.lokr.apply_preset.module_algo_map['Attention'].factor",
            "-2",
        ),
        (
            lokr(apply_preset={"name_algo_map": {"(": {}}, "use_fnmatch": False}),
            "adapter.lokr.apply_preset.name_algo_map['(']",
            "no regular expression",
        ),
        (optimization(max_steps=0), "optimization.max_steps", "0 is outside 1 to 1000000"),
        (optimization(batch_size=0), "optimization.batch_size", "1 to 128"),
        (optimization(batch_size=129), "optimization.batch_size", "lower"),
        (optimization(gradient_accumulation_steps=0), "optimization.gradient_accumulation_steps", "1 to 1024"),
        (optimization(optimizer="adam"), "optimization.optimizer", "did you mean 'adamw'"),
        (optimization(optimizer="adafactor"), "optimization.optimizer", "use bnb-adamw8bit"),
        (optimization(learning_rate="NaN"), "optimization.learning_rate", "nan is not a finite number above 0"),
        (optimization(learning_rate="Infinity"), "optimization.learning_rate", "inf"),
        (optimization(learning_rate=0), "optimization.learning_rate", "above 0"),
        (optimization(learning_rate=-1e-4), "optimization.learning_rate", "-0.0001"),
        (optimization(learning_rate=1.5), "optimization.learning_rate", "at most 1"),
        (optimization(lr_scheduler="cosinus"), "optimization.lr_scheduler", "did you mean 'cosine'"),
        (optimization(weight_decay=-1), "optimization.weight_decay", "at least 0"),
        (optimization(max_grad_norm="NaN"), "optimization.max_grad_norm", "nan"),
        (optimization(grad_clip_method="max"), "optimization.grad_clip_method", "value, norm"),
        (optimization(flow_schedule_shift=0), "optimization.flow_schedule_shift", "above 0"),
        (optimization(flow_sigmoid_scale=-1), "optimization.flow_sigmoid_scale", "above 0"),
        (optimization(caption_dropout_probability=1.1), "optimization.caption_dropout_probability", "at most 1"),
        (violations(validation={}), "validation.prompts", "at least one"),
        (validation(prompts=[{"name": "A b", "prompt": ""}]), "validation.prompts[0].name", "[a-z0-9_-]"),
        (validation(prompts=[PROMPT, PROMPT]), "validation.prompts", "'cat' is given 2 times"),
        (validation(prompts=[{"name": "a", "prompt": "x" * 9000}]), "validation.prompts[0].prompt", "8192"),
        (validation(resolutions=["1024"]), "validation.resolutions[0]", "WIDTHxHEIGHT"),
        (validation(resolutions=["1000x1024"]), "validation.resolutions[0]", "no multiple of 16; use 992"),
        (validation(resolutions=["64x32"]), "validation.resolutions[0]", "outside 64 to 4096"),
        (validation(num_inference_steps=0), "validation.num_inference_steps", "1 to 200"),
        (validation(guidance_scale="NaN"), "validation.guidance_scale", "nan"),
        (validation(num_images=11), "validation.num_images", "1 to 10"),
        (validation(adapter_strength="Infinity"), "validation.adapter_strength", "inf"),
        (violations(trigger_words=[" "]), "trigger_words[0]", "1 to 255"),
    ],
)
def test_violation_names_field_value_and_limit(found: dict[str, str], field: str, words: str) -> None:
    assert list(found) == [field]
    assert words in found[field]


def test_all_violations_are_told_at_once() -> None:
    found = violations(
        name="",
        datasets=[{"dataset": "a", "resolution": 0}],
        adapter={"lokr": {"factor": 0}},
        optimization={"optimizer": "sgd", "learning_rate": "NaN"},
        validation={"prompts": []},
    )
    assert set(found) == {
        "name",
        "datasets[0].resolution",
        "adapter.lokr.factor",
        "optimization.max_steps",
        "optimization.optimizer",
        "optimization.learning_rate",
        "validation.prompts",
    }


def test_name_of_a_dataset_follows_the_same_rule() -> None:
    assert check_dataset_name("my-cats-2") == []
    assert [violation.field for violation in check_dataset_name("My Cats")] == ["name"]


@pytest.mark.parametrize(("text", "size"), [("640x448", (640, 448)), ("640", None), ("axb", None), ("640x448x1", None)])
def test_picture_sizes_are_read(text: str, size: tuple[int, int] | None) -> None:
    assert picture_size(text) == size
