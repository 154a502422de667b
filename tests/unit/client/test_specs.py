"""Job files: every mistake at once, with its path."""

import json
import math
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict
from reverie_client.specs import load_job_spec, parse_job_spec, read_job_text
from reverie_common.errors import FieldViolation, InvalidArgumentError, NotFoundError

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart" / "job.yaml"


def violations_of(text: str) -> dict[str, str]:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_job_spec(text)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_reads_the_quickstart() -> None:
    spec = load_job_spec(QUICKSTART)
    assert spec.datasets[0].dataset == "quickstart"
    assert list(spec.adapter.lokr.apply_preset.target_module) == ["Attention"]
    assert spec.optimization.learning_rate == pytest.approx(3e-3)


def test_json_form_of_a_spec_reads_back_as_the_same_spec() -> None:
    spec = load_job_spec(QUICKSTART)
    assert parse_job_spec(json.dumps(MessageToDict(spec, preserving_proto_field_name=True))) == spec


def test_leaves_what_is_not_given_to_the_server() -> None:
    spec = parse_job_spec("optimization: {max_steps: 5, batch_size: null}")
    assert not spec.optimization.HasField("batch_size")
    assert not spec.HasField("seed")


def test_an_empty_message_is_present() -> None:
    assert parse_job_spec("adapter: {lokr: {}}").adapter.WhichOneof("kind") == "lokr"


def test_a_second_kind_of_adapter_is_refused() -> None:
    found = violations_of("adapter: {lokr: {factor: 4}, lora: {rank: 4}}")
    assert found == {"adapter.lora": "adapter.lokr is given too; remove one of both"}
    spec = parse_job_spec("adapter: {lokr: null, lora: {rank: 4, alpha: 2}}")
    assert (spec.adapter.lora.rank, spec.adapter.lora.alpha) == (4, 2)


def test_takes_numbers_and_booleans_as_strings() -> None:
    spec = parse_job_spec(
        """
        optimization:
          max_steps: "1e3"
          learning_rate: "4e-5"
          batch_size: 2.0
          gradient_checkpointing: "False"
          sample_latents_once: yes
        """
    )
    assert spec.optimization.max_steps == 1000
    assert spec.optimization.learning_rate == pytest.approx(4e-5)
    assert spec.optimization.batch_size == 2
    assert spec.optimization.gradient_checkpointing is False
    assert spec.optimization.sample_latents_once is True


def test_keeps_no_as_a_word() -> None:
    assert parse_job_spec("model: {mixed_precision: no}").model.mixed_precision == "no"


def test_keeps_nan_for_the_server_to_refuse() -> None:
    assert math.isnan(parse_job_spec("optimization: {learning_rate: .nan}").optimization.learning_rate)


def test_reads_settings_as_they_are_written() -> None:
    text = (
        "optimization: {optimizer_config: {d_coef: 0.5, k: 6, use_speed: true, eps: '1e-7', beta3: 1e-3, d0: .000001}}"
    )
    assert dict(parse_job_spec(text).optimization.optimizer_config) == {
        "d_coef": "0.5",
        "k": "6",
        "use_speed": "true",
        "eps": "1e-7",
        "beta3": "0.001",
        "d0": "1e-06",
    }


def test_refuses_a_setting_of_several_values() -> None:
    found = violations_of("optimization: {optimizer_config: {betas: [0.9, 0.99]}}")
    assert "is not one value" in found["optimization.optimizer_config['betas']"]


def test_reads_maps() -> None:
    preset = parse_job_spec(
        "adapter: {lokr: {apply_preset: {name_algo_map: {'double*.attn1.*': {factor: 8}, 'single*': {}}}}}"
    ).adapter.lokr.apply_preset
    assert preset.name_algo_map["double*.attn1.*"].factor == 8
    assert set(preset.name_algo_map) == {"double*.attn1.*", "single*"}


def test_reports_every_mistake_at_once() -> None:
    found = violations_of(
        """
        name: 12
        optimisation: {}
        optimization: {max_steps: -1, optimzer: x, weight_decay: abc, batch_size: 1.5}
        datasets: {dataset: a}
        adapter: {lokr: {algo: lokr, apply_preset: {module_algo_map: {Attention: {facto: 3}}}}}
        validation: {resolutions: [256], prompts: [{name: a, promt: b}]}
        learning_rate: 1
        """
    )
    assert set(found) == {
        "name",
        "optimisation",
        "optimization.max_steps",
        "optimization.optimzer",
        "optimization.weight_decay",
        "optimization.batch_size",
        "datasets",
        "adapter.lokr.algo",
        "adapter.lokr.apply_preset.module_algo_map['Attention'].facto",
        "validation.resolutions[0]",
        "validation.prompts[0].promt",
        "learning_rate",
    }
    assert "did you mean optimizer?" in found["optimization.optimzer"]
    assert "did you mean optimization?" in found["optimisation"]
    assert "optimization.learning_rate" in found["learning_rate"]
    assert "outside 0 to 4294967295" in found["optimization.max_steps"]
    assert "quotes" in found["validation.resolutions[0]"]


@pytest.mark.parametrize("text", ["", "- a", "just words", "12"])
def test_refuses_what_is_not_a_mapping(text: str) -> None:
    assert "not a mapping" in violations_of(text)["the document"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"job\.yaml does not exist"):
        load_job_spec(tmp_path / "job.yaml")


def test_a_file_that_is_not_utf8_is_named_with_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(InvalidArgumentError, match="byte 0xe9 at offset 9"):
        load_job_spec(path)


def test_adds_what_others_find_wrong_but_not_what_follows_from_its_own() -> None:
    reading = read_job_text("{optimisation: {max_steps: 5}, seed: x, trigger_words: word}")
    assert reading.suspects == {"optimization"}
    found_elsewhere = ["optimization.max_steps", "seed", "trigger_words[0]", "datasets", "seeds"]
    error = reading.error([FieldViolation(field=field, description="wrong") for field in found_elsewhere])
    assert [found.field for found in error.violations] == ["optimisation", "seed", "trigger_words", "datasets", "seeds"]
    assert error.message == "5 fields are wrong in the job"
