"""Adapter files: what is read, what is refused, and merging."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from reverie_hidream.adapters import (
    AdapterFileError,
    LokrAdapter,
    LokrConfig,
    LokrPreset,
    attach_lokr,
    load_adapter,
    merge_adapter,
    merged_state,
)
from safetensors.torch import load, save

MakeTransformer = Callable[..., HiDreamImageTransformer2DModel]
LAYER = "single_stream_blocks.0.block.attn1.to_q"
LORA = "lycoris_single_stream_blocks_0_block_attn1_to_q"


def trained(transformer: Any, **settings: Any) -> LokrAdapter:
    config = LokrConfig(**{"factor": 4, **settings})
    adapter = attach_lokr(transformer, config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return adapter


@pytest.fixture
def transformer(make_transformer: MakeTransformer) -> HiDreamImageTransformer2DModel:
    return make_transformer()


@pytest.fixture
def body(make_transformer: MakeTransformer) -> bytes:
    """A file with an adapter of one layer."""
    return trained(make_transformer(), apply_preset=LokrPreset(target_name=(LAYER,))).export(dtype=torch.float64)


def output(transformer: Any) -> torch.Tensor:
    layer = transformer.get_submodule(LAYER)
    hidden = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result: torch.Tensor = layer(hidden)
    return result


def test_a_loaded_adapter_is_frozen_and_can_be_swapped(transformer: Any, body: bytes) -> None:
    base = output(transformer)

    adapter = load_adapter(transformer, body)
    changed = output(transformer)
    adapter.detach()

    assert adapter.selected == [LAYER]
    assert adapter.parameters() == []
    assert not changed.requires_grad
    assert not torch.allclose(changed, base)
    assert torch.equal(output(transformer), base)


def test_the_multiplier_of_the_configuration_counts_on_top_of_the_strength(
    transformer: Any, make_transformer: MakeTransformer
) -> None:
    base = output(transformer)
    adapter = trained(make_transformer(), multiplier=0.5)

    load_adapter(transformer, adapter.export(dtype=torch.float64), strength=2.0)
    doubled = output(transformer) - base

    original = make_transformer()
    again = trained(original, multiplier=0.5)
    as_trained = output(original) - base
    again.detach()
    assert torch.allclose(doubled, 2.0 * as_trained, atol=1e-12)


def test_dotted_names_are_read_too(transformer: Any, make_transformer: MakeTransformer, body: bytes) -> None:
    dotted = {key.replace(LORA, f"transformer.{LAYER}"): tensor for key, tensor in load(body).items()}

    load_adapter(transformer, save(dotted))

    other = make_transformer()
    load_adapter(other, body)
    assert torch.equal(output(transformer), output(other))


def test_merging_writes_the_dense_change_once(transformer: Any, make_transformer: MakeTransformer) -> None:
    settings = {"full_matrix": False, "linear_dim": 2, "linear_alpha": 0.5}
    adapted = make_transformer()
    body = trained(adapted, **settings).export(dtype=torch.float64)
    names = list(transformer.state_dict())

    assert merge_adapter(transformer, body) == 16

    assert list(transformer.state_dict()) == names
    assert torch.allclose(output(transformer), output(adapted), atol=1e-12)
    assert not transformer.get_submodule(LAYER).weight.requires_grad


def test_merged_state_leaves_the_model_alone(transformer: Any, body: bytes) -> None:
    before = transformer.get_submodule(LAYER).weight.clone()

    state = merged_state(transformer, body, strength=0.5)

    assert list(state) == [f"{LAYER}.weight"]
    assert not torch.equal(state[f"{LAYER}.weight"], before)
    assert torch.equal(transformer.get_submodule(LAYER).weight, before)


def test_merging_into_bfloat16_rounds_once(make_transformer: MakeTransformer, body: bytes) -> None:
    narrow, wide = make_transformer(torch.bfloat16), make_transformer(torch.bfloat16).float()

    merged = merged_state(narrow, body)[f"{LAYER}.weight"]

    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, merged_state(wide, body)[f"{LAYER}.weight"].bfloat16())


def test_merging_into_a_quantised_weight_is_refused(make_transformer: MakeTransformer, body: bytes) -> None:
    quantised = make_transformer(torch.float32, "int8-quanto")

    with pytest.raises(AdapterFileError, match="merge first, then quantise"):
        merge_adapter(quantised, body)


def test_a_quantised_model_takes_the_adapter_beside_its_weights(make_transformer: MakeTransformer, body: bytes) -> None:
    quantised, plain = make_transformer(torch.float32, "int8-quanto"), make_transformer(torch.float32)
    hidden = torch.randn(3, 32)
    changes = []
    for model in (quantised, plain):
        layer = model.get_submodule(LAYER)
        base = layer(hidden)
        load_adapter(model, body)
        changes.append(layer(hidden) - base)

    assert torch.allclose(changes[0], changes[1], atol=1e-5)


def without(body: bytes, name: str) -> bytes:
    return save({key: tensor for key, tensor in load(body).items() if not key.endswith(name)})


def replaced(body: bytes, name: str, tensor: torch.Tensor) -> bytes:
    return save({key: tensor if key.endswith(name) else kept for key, kept in load(body).items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: b"not safetensors", "not a readable safetensors file"),
        (lambda body: body[: len(body) // 2], "not a readable safetensors file"),
        (lambda body: save({}), "another model"),
        (lambda body: save({"transformer.x.lora_A.bias": torch.ones(2, 2)}), "no part of a LoKr"),
        (lambda body: without(body, "alpha"), "has no alpha, so its scale is unknown"),
        (lambda body: save({"lycoris_unknown.lokr_w1": torch.ones(2, 2)}), r"unknown modules \['lycoris_unknown'\]"),
        (lambda body: without(body, "lokr_w1"), "needs either lokr_w1 or lokr_w1_a and lokr_w1_b"),
        (lambda body: replaced(body, "lokr_w1", torch.ones(3, 3)), "changes a 24x24 weight"),
        (lambda body: replaced(body, "lokr_w2", torch.full((8, 8), torch.nan)), "not finite"),
        (lambda body: replaced(body, "lokr_w1", torch.ones(3)), "must be matrices"),
        (lambda body: replaced(body, "alpha", torch.ones(3)), "alpha must be one number"),
        (
            lambda body: save({key.replace("attn1_to_q", "attn1"): tensor for key, tensor in load(body).items()}),
            "HiDreamAttention and not a Linear",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_nothing_changes(
    change: Callable[[bytes], bytes], message: str, transformer: Any, body: bytes
) -> None:
    base = output(transformer)

    with pytest.raises(AdapterFileError, match=message):
        load_adapter(transformer, change(body))

    assert torch.equal(output(transformer), base)
    assert not any("forward" in vars(module) for module in transformer.modules())


def test_a_file_with_a_configuration_of_another_tool_still_loads(transformer: Any, body: bytes) -> None:
    adapter = load_adapter(transformer, save(load(body), {"lycoris_config": "{not json"}))

    assert adapter.num_modules == 1
