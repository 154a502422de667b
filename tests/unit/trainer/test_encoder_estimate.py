"""Encoders' memory: counts against transformers' own classes, sizes against spec 10.2."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reverie_hidream.text import ENCODER_NAMES, load_text_encoder
from reverie_trainer.jobs.admission.encoder_estimate import (
    ENCODER_PARTS,
    RELEASED_CONFIGS,
    count_parameters,
    encoder_memory,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

BUILDERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "clip_l": (CLIPTextModelWithProjection, CLIPTextConfig, {}),
    "clip_g": (CLIPTextModelWithProjection, CLIPTextConfig, {}),
    "t5": (T5EncoderModel, T5Config, {"feed_forward_proj": "gated-gelu"}),
    "llama": (LlamaModel, LlamaConfig, {}),
}


@pytest.mark.parametrize("name", ENCODER_NAMES)
def test_released_encoders_have_as_many_parameters_as_transformers_builds(name: str) -> None:
    model_class, config_class, more = BUILDERS[name]
    with torch.device("meta"):
        model = model_class(config_class(**RELEASED_CONFIGS[name], **more))
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(name, RELEASED_CONFIGS[name]) == (linear, total - linear)


@pytest.mark.parametrize("name", ENCODER_NAMES)
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_tiny_encoders_take_what_they_take(tiny_checkpoint: Path, name: str, precision: str) -> None:
    config = json.loads((tiny_checkpoint / ENCODER_PARTS[name] / "config.json").read_text())
    sizes = {part.name: part.size_bytes for part in encoder_memory({name: config}, {name: precision}, {})}
    if precision == "no_change":
        encoder = load_text_encoder(tiny_checkpoint, name, precision=precision)
        held = {parameter.data_ptr(): parameter.nbytes for parameter in encoder._model.parameters()}
        assert sizes[f"{name} (no_change)"] == sum(held.values())
    linear, plain = count_parameters(name, config)
    assert sizes[f"{name} ({precision})"] == 2 * plain + (2 if precision == "no_change" else 1) * linear


def test_sizes_are_those_of_the_specification() -> None:
    def sizes(precision: str) -> list[float]:
        parts = encoder_memory({}, dict.fromkeys(ENCODER_PARTS, precision), {})
        return [part.size_bytes / 1e9 for part in parts]

    clip_l, clip_g, t5, llama = sizes("no_change")
    assert (clip_l, clip_g, t5) == pytest.approx((0.25, 1.39, 9.52), rel=0.01)
    # 16.06 GB with the head, which the service drops.
    assert llama == pytest.approx(16.06 - 128256 * 4096 * 2 / 1e9, rel=0.001)
    _, _, t5, llama = sizes("int8-quanto")
    assert t5 == pytest.approx(4.8, rel=0.03)
    assert llama == pytest.approx(8.0, rel=0.03)
    in_float32 = encoder_memory({}, {}, {"t5": "F32"})[2].size_bytes
    assert in_float32 == pytest.approx(2 * 9.52e9, rel=0.01)


def test_a_configuration_without_a_key_names_the_file() -> None:
    with pytest.raises(ValueError, match=r"text_encoder_3/config.json.*d_model"):
        count_parameters("t5", {})
