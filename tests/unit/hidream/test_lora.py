"""LoRA: starts and products against PEFT and the formula, files against diffusers and a ComfyUI key map."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from diffusers.loaders import HiDreamImageLoraLoaderMixin
from reverie_hidream.adapters import (
    AdapterConfigError,
    AdapterMatchesNothingError,
    LoraConfig,
    attach_adapter,
    load_adapter,
    merge_adapter,
)
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.transformer import predict_velocity
from safetensors import safe_open
from safetensors.torch import load
from torch import nn
from torch.nn import functional

MakeTransformer = Callable[..., HiDreamImageTransformer2DModel]
MakeConditioning = Callable[..., TextConditioning]
Predict = Callable[[Any], torch.Tensor]

CONFIGS = {
    "default": LoraConfig(rank=4),
    "alpha": LoraConfig(rank=4, alpha=1.0),
    "gaussian": LoraConfig(rank=4, init_type="gaussian"),
    "olora": LoraConfig(rank=4, alpha=2.0, init_type="olora"),
    "pissa": LoraConfig(rank=4, init_type="pissa"),
    "dora": LoraConfig(rank=4, use_dora=True),
}
each = pytest.mark.parametrize("name", CONFIGS)
Q = "single_stream_blocks.0.block.attn1.to_q"


class Pipeline(HiDreamImageLoraLoaderMixin):  # type: ignore[misc]  # diffusers has no types
    """What diffusers needs to load a LoRA: a transformer."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.hf_device_map = None
        self.components = {"transformer": transformer}
        self._component_names = ["transformer"]


@pytest.fixture(scope="module")
def predict(make_conditioning: MakeConditioning) -> Predict:
    """The velocity of one fixed input."""
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def run(transformer: Any) -> torch.Tensor:
        dtype = transformer.x_embedder.proj.bias.dtype
        with torch.no_grad():
            return predict_velocity(transformer, latents, torch.tensor([500.0]), make_conditioning(dtype=dtype))

    return run


def stir(adapter: Any, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += size * torch.randn(tensor.shape, generator=generator)


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


def test_adapts_the_four_projections_of_every_attention(make_transformer: MakeTransformer) -> None:
    adapter = attach_adapter(make_transformer(), LoraConfig(rank=4))

    # 3 blocks, 4 projections each; the text stream's `to_q_t` and so on do not end like them.
    assert adapter.num_modules == 12
    assert adapter.num_parameters == 12 * 4 * (32 + 32)
    assert attach_adapter(make_transformer(), LoraConfig(rank=4, target_modules=("to_q_t", Q))).num_modules == 2


def test_a_target_that_nothing_ends_with_is_refused_with_what_there_is(make_transformer: MakeTransformer) -> None:
    with pytest.raises(AdapterMatchesNothingError, match=r"to_out\.0.*ends of this model's names are .*to_out"):
        attach_adapter(make_transformer(), LoraConfig(target_modules=("to_out.0",)))


@each
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_starts_without_a_change_and_its_file_does_what_was_trained(
    name: str, precision: str, make_transformer: MakeTransformer, predict: Predict
) -> None:
    transformer = make_transformer(torch.float32, precision)
    base = predict(transformer)
    if name == "dora" and precision != "no_change":
        with pytest.raises(AdapterConfigError, match=r"12 of the selected are quantised.*base_precision to no_change"):
            attach_adapter(transformer, CONFIGS[name])
        return
    adapter = attach_adapter(transformer, CONFIGS[name], seed=3)
    assert off(predict(transformer), base) < 1e-5
    stir(adapter)
    trained, body = predict(transformer), adapter.export(dtype=torch.float32)
    adapter.detach()
    assert torch.equal(predict(transformer), base)

    loaded = load_adapter(transformer, body)

    assert off(trained, base) > 1e-3
    assert off(predict(transformer), trained) < 1e-5
    loaded.set_strength(0.0)
    assert torch.equal(predict(transformer), base)


@pytest.mark.parametrize("init_type", ["default", "gaussian", "olora", "pissa"])
def test_starts_as_peft_starts_and_keeps_the_weight(init_type: str, make_transformer: MakeTransformer) -> None:
    transformer = make_transformer(torch.float32)
    weight = transformer.get_submodule(Q).weight.clone()
    state = attach_adapter(
        transformer, LoraConfig(rank=4, init_type=init_type, target_modules=(Q,)), seed=7
    ).raw_state()

    holder = nn.ModuleDict({"linear": nn.Linear(32, 32)})
    holder["linear"].weight = nn.Parameter(weight.clone())
    with torch.random.fork_rng():
        torch.manual_seed(7)
        init: Any = True if init_type == "default" else init_type
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=4, lora_alpha=4, target_modules=["linear"], init_lora_weights=init), holder
        )
    layer: Any = holder["linear"]

    name = f"lycoris_{Q.replace('.', '_')}"
    assert torch.equal(state[f"{name}.lora_down.weight"], layer.lora_A["default"].weight)
    assert torch.equal(state[f"{name}.lora_up.weight"], layer.lora_B["default"].weight)
    assert torch.equal(transformer.get_submodule(Q).weight, weight)


def test_the_change_is_the_product_times_alpha_over_rank(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer()
    layer = transformer.get_submodule(Q)
    hidden = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = layer(hidden)
    config = LoraConfig(rank=4, alpha=6.0, target_modules=(Q,))
    adapter = attach_adapter(transformer, config, dtype=torch.float64)
    stir(adapter)
    a, b = (adapter.raw_state()[f"lycoris_{Q.replace('.', '_')}.lora_{end}.weight"] for end in ("down", "up"))

    assert torch.allclose(layer(hidden), base + hidden @ (1.5 * b @ a).T, atol=1e-12)


def test_dora_is_the_formula_of_its_paper(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer()
    layer: Any = transformer.get_submodule(Q)
    hidden = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = LoraConfig(rank=4, use_dora=True, target_modules=(Q,))
    adapter = attach_adapter(transformer, config, dtype=torch.float64)
    stir(adapter)
    name = f"lycoris_{Q.replace('.', '_')}"
    state = {key.removeprefix(f"{name}."): tensor for key, tensor in adapter.raw_state().items()}

    changed = layer.weight + state["lora_up.weight"] @ state["lora_down.weight"]
    lengths = changed.square().sum(1, keepdim=True).sqrt()
    expected = functional.linear(hidden, state["lora_magnitude_vector"] * changed / lengths, layer.bias)
    assert torch.allclose(layer(hidden), expected, atol=1e-12)


def test_no_gradient_flows_through_dora_s_lengths_as_in_peft(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer(torch.float32)
    layer: Any = transformer.get_submodule(Q)
    config = LoraConfig(rank=4, use_dora=True, target_modules=(Q,))
    adapter = attach_adapter(transformer, config)
    stir(adapter)
    holder = nn.ModuleDict({"linear": nn.Linear(32, 32)})
    holder["linear"].load_state_dict(layer.state_dict())
    settings = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["linear"], use_dora=True)
    peft.inject_adapter_in_model(settings, holder)
    theirs: Any = holder["linear"]
    ours = {key.rpartition("attn1_to_q.")[2]: tensor for key, tensor in adapter.named_parameters().items()}
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours["lora_down.weight"])
        theirs.lora_B["default"].weight.copy_(ours["lora_up.weight"])
        theirs.lora_magnitude_vector["default"].weight.copy_(ours["lora_magnitude_vector"].flatten())
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    layer(hidden).square().sum().backward()
    theirs(hidden).square().sum().backward()

    for name, expected in (("lora_down", theirs.lora_A), ("lora_up", theirs.lora_B)):
        gradient = ours[f"{name}.weight"].grad
        assert gradient is not None
        assert torch.allclose(gradient, expected["default"].weight.grad, rtol=1e-4, atol=1e-5)


def test_the_file_is_that_of_the_specification(make_transformer: MakeTransformer, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(attach_adapter(make_transformer(), LoraConfig(rank=4)).export())

    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        keys = list(file.keys())
        assert len(keys) == 24
        assert file.get_tensor(f"transformer.{Q}.lora_A.weight").shape == (4, 32)
        assert file.get_tensor(f"transformer.{Q}.lora_B.weight").shape == (32, 4)
        assert not any("alpha" in key for key in keys)
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 4.0)


def test_comfyui_s_format_states_alpha_beside_each_pair(make_transformer: MakeTransformer) -> None:
    keys = load(attach_adapter(make_transformer(), LoraConfig(rank=4, alpha=2.0, format="comfyui")).export())

    assert len(keys) == 36
    assert float(keys[f"transformer.{Q}.alpha"]) == 2.0


@each
def test_diffusers_does_the_same_with_the_file(
    name: str, make_transformer: MakeTransformer, predict: Predict, tmp_path: Path
) -> None:
    transformer = make_transformer(torch.float32)
    adapter = attach_adapter(transformer, CONFIGS[name])
    stir(adapter)
    trained = predict(transformer)
    (tmp_path / "lora.safetensors").write_bytes(adapter.export(dtype=torch.float32))
    adapter.detach()

    Pipeline(transformer).load_lora_weights(str(tmp_path), weight_name="lora.safetensors")

    assert off(predict(transformer), trained) < 1e-5


@each
def test_merging_is_the_same_as_applying(name: str, make_transformer: MakeTransformer, predict: Predict) -> None:
    transformer = make_transformer()
    adapter = attach_adapter(transformer, CONFIGS[name], dtype=torch.float64)
    stir(adapter)
    trained, body = predict(transformer), adapter.export(dtype=torch.float64)
    adapter.detach()

    assert merge_adapter(transformer, body) == 12

    assert off(predict(transformer), trained) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 is outside 1 to 256"),
        ({"alpha": 0.0}, "alpha 0.0 must be a finite number above 0"),
        ({"dropout": 1.0}, "dropout 1.0 is outside 0 to below 1"),
        ({"init_type": "loftq"}, "init_type 'loftq' is unknown; use one of default, gaussian, olora, pissa"),
        ({"format": "kohya"}, "format 'kohya' is unknown; use one of diffusers, comfyui"),
        ({"target_modules": ()}, "target_modules names no module"),
        ({"use_dora": True, "init_type": "pissa"}, "exclude each other"),
    ],
)
def test_refuses_values_without_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterConfigError, match=message):
        LoraConfig(**settings)


def test_a_rank_above_the_weight_s_is_refused_for_starts_from_the_weight(make_transformer: MakeTransformer) -> None:
    with pytest.raises(AdapterConfigError, match=r"has at most 32, rank is 33; lower the rank"):
        attach_adapter(make_transformer(), LoraConfig(rank=33, init_type="pissa"))
