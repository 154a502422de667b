"""What a published repository says of its use; the card as a whole is in tests/integration/trainer/outlets."""

import pytest
from google.protobuf.json_format import ParseDict
from reverie.training.v1.job_pb2 import TrainingJob
from reverie_trainer.jobs.outlets.model_card import model_card, result_file


@pytest.mark.parametrize(
    ("adapter", "file", "line"),
    [
        ({"lokr": {}}, "pytorch_lora_weights.safetensors", "network.apply_to()"),
        ({"lycoris": {"algo": "loha"}}, "pytorch_lora_weights.safetensors", "network.apply_to()"),
        ({"lora": {}}, "pytorch_lora_weights.safetensors", 'pipeline.load_lora_weights("me/cat", weight_name='),
        (
            {"full_rank": {}},
            "transformer/diffusion_pytorch_model.safetensors",
            "pipeline.transformer.load_state_dict(load_file(file))",
        ),
    ],
)
def test_card_loads_each_kind_by_its_own_means(adapter: dict[str, object], file: str, line: str) -> None:
    spec = {"adapter": adapter, "publishing": {"hub_model_id": "me/cat"}, "model": {"flavour": "full"}}
    job = ParseDict({"spec": spec}, TrainingJob())
    usage = model_card(job, []).split("## How to use it")[1]
    assert result_file(job) == file
    assert file in usage
    assert line in usage
    assert "merge_to" not in usage  # lycoris-lora's scales some adapters twice
