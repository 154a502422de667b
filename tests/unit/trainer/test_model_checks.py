"""What a job may say of precisions and memory, and what the encoder services must hold."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf.json_format import ParseDict
from reverie.encoder.v1 import encoder_pb2
from reverie.training.v1 import job_pb2
from reverie_hidream.precisions import BASE_PRECISIONS, ENCODER_PRECISIONS, REFUSED
from reverie_trainer.jobs.admission.encoder_requirements import require_precisions, unmet
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.running.failures import JobFailedError
from reverie_trainer.jobs.spec import spec_from_proto

MINIMAL: dict[str, object] = {
    "name": "cats",
    "datasets": [{"dataset": "cats"}],
    "adapter": {"lokr": {}},
    "optimization": {"max_steps": 5},
}


def violations(**changes: object) -> dict[str, str]:
    spec = spec_from_proto(ParseDict({**MINIMAL, **changes}, job_pb2.TrainingJobSpec()))
    return {violation.field: violation.description for violation in check_spec(spec)}


@pytest.mark.parametrize("precision", BASE_PRECISIONS)
def test_every_trainable_precision_is_taken_for_the_base(precision: str) -> None:
    assert violations(model={"base_precision": precision, "quantize_via": "cpu"}) == {}


@pytest.mark.parametrize("precision", sorted({*REFUSED, *ENCODER_PRECISIONS} - set(BASE_PRECISIONS)))
def test_others_are_refused_for_the_base_with_what_works(precision: str) -> None:
    description = violations(model={"base_precision": precision})["model.base_precision"]
    assert precision in description
    assert any(f"use {works!r}" in description for works in BASE_PRECISIONS)


@pytest.mark.parametrize("precision", ENCODER_PRECISIONS)
def test_every_precision_is_taken_for_an_encoder(precision: str) -> None:
    assert violations(model={"text_encoder_precision": {"t5": precision, "llama": "no_change"}}) == {}


@pytest.mark.parametrize(
    ("found", "field", "words"),
    [
        (violations(model={"quantize_via": "pipeline"}), "model.quantize_via", "accelerator, cpu"),
        (
            violations(model={"text_encoder_precision": {"t6": "int8-quanto"}}),
            "model.text_encoder_precision['t6']",
            "did you mean 't5'",
        ),
        (
            violations(model={"text_encoder_precision": {"t5": "int8-sdnq"}}),
            "model.text_encoder_precision['t5']",
            "SDNQ",
        ),
        (
            violations(memory={"gradient_checkpointing_interval": 101}),
            "memory.gradient_checkpointing_interval",
            "1 to 100 blocks",
        ),
        (
            violations(
                memory={"gradient_checkpointing_interval": 2},
                optimization={"max_steps": 5, "gradient_checkpointing": False},
            ),
            "memory.gradient_checkpointing_interval",
            "set optimization.gradient_checkpointing",
        ),
        (
            violations(memory={"num_offloaded_blocks": 4}, adapter={"full_rank": {}}),
            "memory.num_offloaded_blocks",
            "or train an adapter",
        ),
        (
            violations(model={"base_precision": "int8-quanto"}, adapter={"full_rank": {}}),
            "model.base_precision",
            "cannot be trained at full rank",
        ),
    ],
)
def test_each_rule(found: dict[str, str], field: str, words: str) -> None:
    assert words in found[field]


def test_what_saves_memory_is_taken_together() -> None:
    memory = {"gradient_checkpointing_interval": 2, "num_offloaded_blocks": 8, "offload_during_startup": True}
    assert violations(memory=memory) == {}


T5 = encoder_pb2.EncoderDescription(encoder=encoder_pb2.ENCODER_T5, precision="int8-quanto")
OTHER_T5 = encoder_pb2.EncoderDescription(encoder=encoder_pb2.ENCODER_T5, precision="no_change")


def test_an_encoder_held_as_wanted_is_enough() -> None:
    assert unmet({"t5": "int8-quanto"}, [T5]) == []
    assert unmet({}, [OTHER_T5]) == []
    # Nobody is told to start a service with a name that it would refuse.
    assert unmet({"t5": "int8"}, [T5]) == []
    # Preparation names encoders that nobody holds.
    assert unmet({"llama": "nf4-bnb"}, [T5]) == []


def test_the_first_that_holds_an_encoder_counts() -> None:
    assert unmet({"t5": "int8-quanto"}, [T5, OTHER_T5]) == []
    assert len(unmet({"t5": "int8-quanto"}, [OTHER_T5, T5])) == 1


def test_preparation_fails_with_the_remedy() -> None:
    with pytest.raises(JobFailedError, match="holds it in 'no_change'; restart the service with --precision t5=int8"):
        require_precisions({"t5": "int8-quanto"}, [OTHER_T5])


def test_the_table_needs_no_torch() -> None:
    script = "import sys, reverie_hidream.precisions as p; sys.exit('torch' in sys.modules or not p.PRECISIONS)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_example_is_accepted() -> None:
    example = Path(__file__).parents[3] / "examples" / "jobs" / "low-memory.yaml"
    spec = spec_from_proto(ParseDict(yaml.safe_load(example.read_text(encoding="utf-8")), job_pb2.TrainingJobSpec()))
    assert check_spec(spec) == []
    assert spec.memory.num_offloaded_blocks == 3
