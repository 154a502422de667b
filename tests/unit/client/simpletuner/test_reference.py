"""The reference configuration, unchanged, becomes the job that it describes."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from reverie_client.job_text import job_text
from reverie_client.simpletuner import Imported, Outcome, import_configuration
from reverie_client.specs import parse_job_spec
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.spec import spec_from_proto

EXPECTED = Path(__file__).parent / "reference.job.yaml"
MAPS = ("module_algo_map", "name_algo_map")


def bring(reference: Path, **overrides: Any) -> Imported:
    return import_configuration(reference, dataset_root=Path("/photos"), overrides=overrides)


def leaves(document: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a file as the report spells them: what lies in a preset has its path, lists are one value."""
    for key, value in document.items():
        if key == "apply_preset" or (prefix.startswith("apply_preset") and isinstance(value, dict)):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_it_becomes_the_expected_job(reference: Path) -> None:
    assert bring(reference).document == yaml.safe_load(EXPECTED.read_text())


def test_every_key_of_every_file_has_exactly_one_line(reference: Path) -> None:
    counts = Counter((line.file, line.key) for line in bring(reference).report.lines if line.outcome != "added")
    expected = Counter(("config.json", key) for key in json.loads((reference / "config.json").read_text()))
    for entry in json.loads((reference / "multidatabackend.json").read_text()):
        expected.update(("multidatabackend.json", f"{entry['id']}.{key}") for key in entry)
    used = yaml.safe_load((reference / "lycoris_config.json").read_text())  # trailing commas are no JSON, but YAML
    expected.update(("lycoris_config.json", key) for key in leaves(used))
    for name in ("lycoris_config.names.json", "user_prompt_library.json"):
        expected.update((name, key) for key in json.loads((reference / name).read_text()))
    assert counts == expected


def test_nothing_of_it_is_refused_and_the_job_is_accepted(reference: Path) -> None:
    imported = bring(reference)
    assert imported.report.of(Outcome.REFUSED) == []
    assert check_spec(spec_from_proto(parse_job_spec(job_text(imported.document, imported.comments)))) == []


def test_the_text_says_what_the_document_says(reference: Path) -> None:
    imported = bring(reference)
    text = job_text(imported.document, imported.comments, "two\nlines")
    assert text.startswith("# two\n# lines\n")
    assert yaml.safe_load(text) == imported.document
    assert "# not in config.json: SimpleTuner's default\n  negative_prompt:" in text


def test_datasets_are_planned(reference: Path) -> None:
    first, second = bring(reference).plans
    assert first.commands()[1] == (
        "reverie dataset add pseudo-camera-10k-hidream /photos/datasets/pseudo-camera-10k --captions filename"
    )
    assert second.commands() == (
        "reverie dataset create dreambooth-subject",
        "reverie dataset add dreambooth-subject /photos/datasets/dreambooth-subject --captions none --instance-prompt",
    )


def test_the_file_with_names_selects_by_name_alone(reference: Path) -> None:
    imported = bring(reference, lycoris_config="config/lycoris_config.names.json")
    preset = imported.document["adapter"]["lokr"]["apply_preset"]
    assert "target_module" not in preset
    assert len(preset["name_algo_map"]) == 5
    assert preset["use_fnmatch"] is True
    reasons = [line.reason for line in imported.report.lines if line.key == "apply_preset.target_module"]
    assert "448" in reasons[0]
    assert "1128" in reasons[0]
    assert check_spec(spec_from_proto(parse_job_spec(job_text(imported.document, {})))) == []


def test_the_prompt_library_gets_names_for_files_and_comes_before_the_main_prompt(reference: Path) -> None:
    imported = bring(reference, **{"--user_prompt_library": "config/user_prompt_library.json"})
    names = [prompt["name"] for prompt in imported.document["validation"]["prompts"]]
    assert names[:2] == ["anime_token", "chef_token"]
    assert names[-2:] == ["family", "validation"]
    lines = {line.key: line for line in imported.report.lines if line.file == "user_prompt_library.json"}
    assert lines["anime_<token>"].outcome == "changed"
    assert "<token>" in lines["anime_<token>"].reason
    assert lines["woman"].outcome == "honoured"
    assert len(lines) == 15


def test_the_reference_says_what_does_nothing_there(reference: Path) -> None:
    reasons = {line.key: line.reason for line in bring(reference).report.lines}
    assert "dataset_type eval" in reasons["eval_steps_interval"]
    assert "dataset_type eval" in reasons["num_eval_images"]
    assert "SimpleTuner" in reasons["validation_guidance_rescale"]
    assert "reverie job resume" in reasons["resume_from_checkpoint"]
