"""What other programs make of exported files, and what is refused of broken ones.

`comfyui_change` is an independent reader, written from ComfyUI's documented rules for HiDream: keys are
`lycoris_<path with _>` or `transformer.<dotted path>`; a LoKr with two whole factors has scale 1, a split one alpha
over its rank; a LoRA has alpha over its rank, or 1 without an alpha.
"""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from lycoris import create_lycoris_from_weights
from reverie_hidream.adapters import (
    AdapterFileError,
    LokrConfig,
    LokrOverrides,
    LokrPreset,
    LoraConfig,
    attach_adapter,
    load_adapter,
)
from reverie_hidream.adapters.config import AdapterConfig
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.transformer import predict_velocity
from safetensors.torch import load, save

MakeTransformer = Callable[..., HiDreamImageTransformer2DModel]
MakeConditioning = Callable[..., TextConditioning]
Tensors = dict[str, torch.Tensor]

NAMES = {
    pattern: LokrOverrides(factor=4)
    for pattern in (
        "double_stream_blocks.*.block.attn*",
        "double_stream_blocks.*.block.ff_t*",
        "double_stream_blocks.*.block.ff_i.shared_experts*",
        "single_stream_blocks.*.block.attn*",
        "single_stream_blocks.*.block.ff_i.shared_experts*",
    )
}
LOKRS: dict[str, AdapterConfig] = {
    "attention": LokrConfig(factor=4, use_scalar=True),
    "feed-forward": LokrConfig(
        factor=4, use_scalar=True, apply_preset=LokrPreset(target_module=("Attention", "FeedForward"))
    ),
    "names": LokrConfig(factor=4, use_scalar=True, apply_preset=LokrPreset(name_algo_map=NAMES, use_fnmatch=True)),
    "split": LokrConfig(factor=4, full_matrix=False, linear_dim=2, linear_alpha=0.5),
    "split-both": LokrConfig(factor=16, full_matrix=False, linear_dim=1, decompose_both=True),
    "dora": LokrConfig(factor=4, dora_wd=True),
}
FILES: dict[str, AdapterConfig] = {
    **LOKRS,
    "lora": LoraConfig(rank=4, format="comfyui"),
    "lora-alpha": LoraConfig(rank=4, alpha=1.0, format="comfyui"),
    "lora-diffusers": LoraConfig(rank=4),
    "lora-dora": LoraConfig(rank=4, use_dora=True, format="comfyui"),
}


def comfyui_change(key: str, tensors: Tensors, weight: torch.Tensor) -> torch.Tensor | None:
    """The new weight of the layer that ComfyUI knows by `key`; None where the file has nothing for it."""
    own = {
        name.removeprefix(f"{key}."): tensor.double() for name, tensor in tensors.items() if name.startswith(f"{key}.")
    }
    if not own:
        return None
    rank = None
    if "lora_A.weight" in own:
        rank = own["lora_A.weight"].shape[0]
        change = own["lora_B.weight"] @ own["lora_A.weight"]
    else:
        parts = []
        for part in ("lokr_w1", "lokr_w2"):
            if part not in own:
                rank = own[f"{part}_b"].shape[0]
                own[part] = own[f"{part}_a"] @ own[f"{part}_b"]
            parts.append(own[part])
        change = torch.kron(*parts)
    scale = float(own["alpha"]) / rank if rank is not None and "alpha" in own else 1.0
    changed = weight.double() + scale * change
    if "dora_scale" in own:
        changed = own["dora_scale"] * changed / changed.norm(dim=1, keepdim=True)
    return changed


def comfyui_merge(transformer: Any, tensors: Tensors) -> int:
    """Merge a file as ComfyUI does; returns the number of its tensors that found a layer."""
    used = 0
    for name, weight in transformer.state_dict().items():
        path, _, end = name.rpartition(".")
        if end != "weight":
            continue
        for key in (f"lycoris_{path.replace('.', '_')}", f"transformer.{path}"):
            changed = comfyui_change(key, tensors, weight)
            if changed is not None:
                weight.copy_(changed)
                used += sum(other.startswith(f"{key}.") for other in tensors)
    return used


def stir(adapter: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)


@pytest.fixture(scope="module")
def predict(make_conditioning: MakeConditioning) -> Callable[[Any], torch.Tensor]:
    latents = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    @torch.no_grad()
    def run(transformer: Any) -> torch.Tensor:
        dtype = transformer.x_embedder.proj.bias.dtype
        return predict_velocity(transformer, latents, torch.tensor([500.0]), make_conditioning(dtype=dtype))

    return run


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", FILES)
def test_comfyui_s_rules_give_the_trained_model(
    name: str, make_transformer: MakeTransformer, predict: Callable[[Any], torch.Tensor]
) -> None:
    transformer = make_transformer()
    adapter = attach_adapter(transformer, FILES[name], dtype=torch.float64)
    stir(adapter)
    trained, tensors = predict(transformer), load(adapter.export(dtype=torch.float64))
    adapter.detach()

    with torch.no_grad():
        assert comfyui_merge(transformer, tensors) == len(tensors)

    assert off(predict(transformer), trained) < 1e-6


@pytest.mark.parametrize("name", LOKRS)
def test_lycoris_applies_the_file_like_us(
    name: str, make_transformer: MakeTransformer, predict: Callable[[Any], torch.Tensor], tmp_path: Path
) -> None:
    transformer = make_transformer(torch.float32)
    adapter = attach_adapter(transformer, LOKRS[name])
    stir(adapter)
    trained, file = predict(transformer), tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(adapter.export(dtype=torch.float32))
    adapter.detach()

    network, _ = create_lycoris_from_weights(1.0, str(file), transformer)
    network.apply_to()

    assert len(network.loras) == adapter.num_modules
    assert off(predict(transformer), trained) < 1e-5


@pytest.fixture(scope="module")
def lokr_file(make_transformer: MakeTransformer) -> Tensors:
    """On layers that are not square, so that a transposed factor can be seen."""
    preset = LokrPreset(target_name=("*.ff_t.w1", "*.ff_t.w2"), use_fnmatch=True)
    config = LokrConfig(factor=4, full_matrix=False, linear_dim=2, apply_preset=preset)
    return load(attach_adapter(make_transformer(), config).export())


@pytest.fixture(scope="module")
def lora_file(make_transformer: MakeTransformer) -> Tensors:
    return load(attach_adapter(make_transformer(), LoraConfig(rank=4, target_modules=("w1",))).export())


def renamed(tensors: Tensors, old: str, new: str) -> bytes:
    return save({key.replace(old, new): tensor for key, tensor in tensors.items()})


def changed(tensors: Tensors, end: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> bytes:
    result = {key: change(tensor) if key.endswith(end) else tensor for key, tensor in tensors.items()}
    return save({key: tensor.contiguous() for key, tensor in result.items() if tensor is not None})


BROKEN_LOKR: dict[str, tuple[Callable[[Tensors], bytes], str]] = {
    "wrong prefix": (lambda file: renamed(file, "lycoris_", "lora_unet_"), "unknown modules .*lora_unet_double"),
    "another model's names": (
        lambda file: renamed(file, "double_stream_blocks", "joint_blocks"),
        "for another model: it changes 2 unknown modules",
    ),
    "missing alpha": (lambda file: changed(file, ".alpha", lambda _: None), "has no alpha, so its scale is unknown"),
    "missing half": (lambda file: changed(file, ".lokr_w2_b", lambda _: None), "needs either lokr_w2 or lokr_w2_a and"),
    "transposed": (
        lambda file: changed(file, ".lokr_w2_a", lambda tensor: tensor.T),
        "different ranks, or one is transp",
    ),
    "other size": (
        lambda file: changed(file, ".lokr_w1", lambda tensor: tensor[:2]),
        "another model, or a tensor is tr",
    ),
    "wrong rank": (lambda file: changed(file, ".lokr_w2_b", lambda tensor: tensor[:1]), "have different ranks"),
    "not a number": (lambda file: changed(file, ".lokr_w1", lambda tensor: tensor * torch.nan), "not finite"),
    "infinite": (lambda file: changed(file, ".lokr_w1", lambda tensor: tensor + torch.inf), "not finite"),
    "two alphas": (lambda file: changed(file, ".alpha", lambda _: torch.ones(2)), "alpha must be one number"),
    "truncated": (lambda file: save(file)[:-10], "not a readable safetensors file"),
    "half a header": (lambda file: save(file)[:100], "not a readable safetensors file"),
    "empty": (lambda _: b"", "not a readable safetensors file"),
    "pickle": (lambda file: pickle.dumps({key: tensor.tolist() for key, tensor in file.items()}), "is a pickle"),
    "convolution": (lambda file: renamed(file, "lokr_w1", "lokr_t2"), "Tucker factor of a convolution"),
    "mixed algorithms": (
        lambda file: save({**file, "lycoris_double_stream_blocks_0_block_ff_t_w1.hada_w1_a": torch.ones(2, 2)}),
        "has .*hada_w1_a.* and lacks hada_w1_b",
    ),
    "checkpoint": (lambda _: save({"transformer.x_embedder.proj.weight": torch.ones(2, 2)}), "and lacks on_input"),
}
BROKEN_LORA: dict[str, tuple[Callable[[Tensors], bytes], str]] = {
    "wrong prefix": (lambda file: renamed(file, "transformer.", "unet."), "unknown modules .*unet.double"),
    "transposed": (
        lambda file: changed(file, ".lora_A.weight", lambda tensor: tensor.T),
        "different ranks, or one is tr",
    ),
    "wrong rank": (lambda file: changed(file, ".lora_B.weight", lambda tensor: tensor[:, :3]), "have different ranks"),
    "missing half": (lambda file: changed(file, ".lora_B.weight", lambda _: None), "lacks lora_B.weight"),
    "other size": (
        lambda file: changed(file, ".lora_A.weight", lambda tensor: tensor[:, :8]),
        "changes a 256x8 weight",
    ),
    "bias": (lambda file: renamed(file, "lora_B.weight", "lora_B.bias"), "no part of a LoKr, LoRA"),
}


def refusal(transformer: Any, body: bytes) -> str:
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(transformer, body)
    assert not any("forward" in vars(module) for module in transformer.modules())
    return str(caught.value)


@pytest.fixture(scope="module")
def transformer(make_transformer: MakeTransformer) -> Any:
    return make_transformer()


@pytest.mark.parametrize("name", BROKEN_LOKR)
def test_a_broken_lokr_file_is_refused_with_the_reason(name: str, transformer: Any, lokr_file: Tensors) -> None:
    breakage, reason = BROKEN_LOKR[name]

    assert re.search(reason, refusal(transformer, breakage(lokr_file)))


@pytest.mark.parametrize("name", BROKEN_LORA)
def test_a_broken_lora_file_is_refused_with_the_reason(name: str, transformer: Any, lora_file: Tensors) -> None:
    breakage, reason = BROKEN_LORA[name]

    assert re.search(reason, refusal(transformer, breakage(lora_file)))


def test_the_whole_files_are_accepted(transformer: Any, lokr_file: Tensors, lora_file: Tensors) -> None:
    for file, num_modules in ((lokr_file, 2), (lora_file, 16)):
        adapter = load_adapter(transformer, save(file))
        assert adapter.num_modules == num_modules
        adapter.detach()


@pytest.mark.parametrize(("old", "new"), [("transformer.", "diffusion_model."), ("transformer.", "transformer.")])
def test_both_spellings_of_a_lora_are_read(old: str, new: str, transformer: Any, lora_file: Tensors) -> None:
    adapter = load_adapter(transformer, renamed(lora_file, old, new))

    assert adapter.num_modules == 16
    adapter.detach()
