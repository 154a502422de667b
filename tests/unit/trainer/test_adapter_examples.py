"""The example jobs of docs/adapters.md are accepted, and train something on the tiny and on the released model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.json_format import ParseDict
from reverie.training.v1 import job_pb2
from reverie_hidream.transformer import REAL_CONFIG
from reverie_trainer.jobs.admission.adapter_selection import TransformerConfig, select_adapter
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.spec import Adapter, spec_from_proto

ROOT = Path(__file__).parents[3]
EXAMPLES = ("lokr-attention", "lokr-names", "lora", "locon", "full-rank")
RELEASED = TransformerConfig.from_json(dict(REAL_CONFIG))


def read_adapter(name: str) -> Adapter:
    content: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "jobs" / f"{name}.yaml").read_text())
    spec = spec_from_proto(ParseDict(_numbers(content), job_pb2.TrainingJobSpec()))
    assert check_spec(spec) == []
    assert spec.adapter is not None
    return spec.adapter


def _numbers(content: Any) -> Any:
    """YAML 1.1 takes 4e-4 for text; the command line reads it as a number."""
    if isinstance(content, dict):
        return {key: _numbers(value) for key, value in content.items()}
    if isinstance(content, str) and content[:1].isdigit():
        return float(content)
    return content


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_accepted_and_selects_all_that_it_names(name: str, tiny_checkpoint: Path) -> None:
    adapter = read_adapter(name)
    tiny = TransformerConfig.from_json(json.loads((tiny_checkpoint / "transformer" / "config.json").read_text()))

    for config in (tiny, RELEASED):
        selection = select_adapter(config, adapter)
        assert selection.num_modules > 0
        assert selection.unmatched == ()


def test_the_documented_counts_are_those_of_the_released_model() -> None:
    counts = {name: select_adapter(RELEASED, read_adapter(name)) for name in EXAMPLES}
    text = (ROOT / "docs" / "adapters.md").read_text()

    for name, selection in counts.items():
        assert (
            f"| [{name}.yaml](../examples/jobs/{name}.yaml) | {selection.num_modules} | {selection.num_parameters:,} |"
            in text
        )
