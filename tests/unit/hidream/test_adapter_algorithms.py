"""Every algorithm of LyCORIS: trained, exported, loaded and merged, on any weights, against LyCORIS itself."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from lycoris import create_lycoris_from_weights
from reverie_hidream.adapters import (
    AdapterConfigError,
    LokrConfig,
    LokrOverrides,
    LokrPreset,
    LycorisConfig,
    attach_adapter,
    load_adapter,
    merge_adapter,
)
from reverie_hidream.adapters.algorithms import ALGORITHMS
from reverie_hidream.adapters.config import AdapterConfig
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.transformer import predict_velocity
from safetensors.torch import load

MakeTransformer = Callable[..., HiDreamImageTransformer2DModel]
MakeConditioning = Callable[..., TextConditioning]
Predict = Callable[[Any], torch.Tensor]

PRESET = LokrPreset(target_name=("*.0.block.attn1.to_[qk]", "*.ff_t.w2", "*.shared_experts.w1"), use_fnmatch=True)


def lycoris(algo: str, **settings: Any) -> LycorisConfig:
    return LycorisConfig(algo=algo, linear_dim=8, linear_alpha=4.0, apply_preset=PRESET, **settings)


CONFIGS: dict[str, AdapterConfig] = {
    "lokr": LokrConfig(factor=4, use_scalar=True, apply_preset=PRESET),
    "lokr-split": LokrConfig(factor=2, full_matrix=False, linear_dim=2, linear_alpha=1.0, apply_preset=PRESET),
    "lokr-both": LokrConfig(
        factor=16, full_matrix=False, linear_dim=1, decompose_both=True, use_scalar=True, apply_preset=PRESET
    ),
    "lokr-dora": LokrConfig(factor=4, dora_wd=True, apply_preset=PRESET),
    "locon": lycoris("locon"),
    "locon-scalar": lycoris("lora", use_scalar=True),
    "locon-dora": lycoris("locon", dora_wd=True),
    "loha": lycoris("loha"),
    "loha-dora-scalar": lycoris("loha", dora_wd=True, use_scalar=True),
    "ia3": lycoris("ia3"),
    "ia3-input": lycoris("ia3", train_on_input=True),
    "dylora": lycoris("dylora", block_size=2),
    "glora": lycoris("glora"),
    "glora-scalar": lycoris("glora", use_scalar=True),
    "full": lycoris("full"),
    "diag-oft": lycoris("diag-oft"),
    "diag-oft-rescaled": lycoris("diag-oft", rescaled=True, constraint=0.001),
    "boft": lycoris("boft"),
    "boft-rescaled": lycoris("boft", rescaled=True),
}
each = pytest.mark.parametrize("name", CONFIGS)

NOT_LOADED_BY_LYCORIS = {
    # IA3Module.make_module_from_state_dict takes one tensor and is given two.
    "ia3": TypeError,
    "ia3-input": TypeError,
}


@pytest.fixture(scope="module")
def predict(make_conditioning: MakeConditioning) -> Predict:
    """The velocity of one fixed input."""
    latents = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def run(transformer: Any) -> torch.Tensor:
        dtype = transformer.x_embedder.proj.bias.dtype
        return predict_velocity(transformer, latents, torch.tensor([500.0, 90.0]), make_conditioning(2, dtype=dtype))

    return run


def stir(adapter: Any, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += size * torch.randn(tensor.shape, generator=generator)


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


def test_every_algorithm_is_tried() -> None:
    assert {getattr(config, "algo", "lokr") for config in CONFIGS.values()} == set(ALGORITHMS)


@each
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_starts_without_a_change_and_trains_every_tensor(
    name: str, precision: str, make_transformer: MakeTransformer, predict: Predict
) -> None:
    transformer = make_transformer(torch.float32, precision)
    base = predict(transformer)
    adapter = attach_adapter(transformer, CONFIGS[name], seed=5)
    adapter.train(False)

    assert off(predict(transformer), base) < 1e-5

    stir(adapter)
    changed = predict(transformer)
    changed.square().sum().backward()

    assert off(changed, base) > 1e-4
    assert all(torch.count_nonzero(torch.as_tensor(parameter.grad)) for parameter in adapter.parameters())
    assert all(parameter.grad is None for parameter in transformer.parameters())


@each
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_the_loaded_file_does_what_was_trained(
    name: str, precision: str, make_transformer: MakeTransformer, predict: Predict
) -> None:
    transformer = make_transformer(torch.float32, precision)
    base = predict(transformer)
    adapter = attach_adapter(transformer, CONFIGS[name])
    stir(adapter)
    adapter.train(False)
    trained, body = predict(transformer), adapter.export(dtype=torch.float32)
    adapter.detach()

    loaded = load_adapter(transformer, body)

    assert off(predict(transformer), trained) < 1e-5
    loaded.set_strength(0.0)
    assert torch.equal(predict(transformer), base)
    loaded.set_strength(1.0)
    loaded.detach()
    assert torch.equal(predict(transformer), base)


@each
def test_merging_is_the_same_as_applying(name: str, make_transformer: MakeTransformer, predict: Predict) -> None:
    transformer = make_transformer()
    adapter = attach_adapter(transformer, CONFIGS[name], dtype=torch.float64)
    stir(adapter)
    adapter.train(False)
    trained, body = predict(transformer), adapter.export(dtype=torch.float64)
    adapter.detach()

    merge_adapter(transformer, body)

    assert off(predict(transformer), trained) < 1e-6


@each
def test_lycoris_does_the_same_with_the_file(
    name: str, make_transformer: MakeTransformer, predict: Predict, tmp_path: Path
) -> None:
    transformer = make_transformer(torch.float32)
    adapter = attach_adapter(transformer, CONFIGS[name])
    stir(adapter)
    adapter.train(False)
    trained = predict(transformer)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(adapter.export(dtype=torch.float32))
    adapter.detach()

    if name in NOT_LOADED_BY_LYCORIS:
        with pytest.raises(NOT_LOADED_BY_LYCORIS[name]):
            create_lycoris_from_weights(1.0, str(file), transformer)
        return
    network, _ = create_lycoris_from_weights(1.0, str(file), transformer)
    network.apply_to()
    network.eval()

    assert len(network.loras) == adapter.num_modules
    assert off(predict(transformer), trained) < 2e-5


@each
def test_raw_state_goes_on_exactly(name: str, make_transformer: MakeTransformer) -> None:
    first, second = make_transformer(torch.float32), make_transformer(torch.float32)
    adapter = attach_adapter(first, CONFIGS[name], seed=1)
    stir(adapter)

    other = attach_adapter(second, CONFIGS[name], seed=2)
    other.load_raw_state(adapter.raw_state())

    assert other.export() == adapter.export()
    states = adapter.raw_state(), other.raw_state()
    assert all(torch.equal(states[1][key], tensor) for key, tensor in states[0].items())


def test_each_module_may_have_an_algorithm_of_its_own(make_transformer: MakeTransformer) -> None:
    preset = LokrPreset(
        module_algo_map={
            "Attention": LokrOverrides(algo="locon", linear_dim=2),
            "FeedForward": LokrOverrides(algo="ia3"),
        }
    )
    adapter = attach_adapter(make_transformer(), LycorisConfig(algo="lokr", apply_preset=preset))

    keys = load(adapter.export())
    assert keys["lycoris_single_stream_blocks_0_block_attn1_to_q.lora_down.weight"].shape == (2, 32)
    assert keys["lycoris_double_stream_blocks_0_block_ff_t_w1.weight"].shape == (256,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algo": "tlora"}, "singular value decomposition"),
        ({"algo": "norm"}, "HiDream's norms have no weights"),
        ({"algo": "lohaa"}, "'lohaa' is unknown; use one of lokr, locon"),
        ({"algo": "ia3", "dora_wd": True}, "ia3 has no dora_wd; leave it out, or use one of lokr, locon, lora, loha"),
        ({"algo": "full", "use_scalar": True}, "full has no use_scalar"),
        ({"algo": "locon", "block_size": 2}, "locon has no block_size; leave it out, or use one of dylora"),
        ({"algo": "dylora", "linear_dim": 6}, "linear_dim 6 is no multiple of block_size 4"),
        ({"algo": "boft", "linear_dim": 1}, "boft cannot split the 32 outputs"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    settings: dict[str, Any], message: str, make_transformer: MakeTransformer
) -> None:
    with pytest.raises(AdapterConfigError, match=message):
        attach_adapter(make_transformer(), LycorisConfig(**settings))


@pytest.mark.parametrize("field", ["dropout", "rank_dropout", "module_dropout"])
def test_overrides_may_set_dropouts(field: str, make_transformer: MakeTransformer, predict: Predict) -> None:
    """LyCORIS 4.1.3 itself fails on them: it passes the argument twice."""
    preset = LokrPreset(module_algo_map={"Attention": LokrOverrides(**{field: 0.5})})  # type: ignore[arg-type]  # by name
    transformer = make_transformer()
    adapter = attach_adapter(transformer, LokrConfig(factor=4, apply_preset=preset))
    stir(adapter)

    with_dropout = predict(transformer)
    adapter.train(False)

    assert off(with_dropout, predict(transformer)) > 1e-4


def test_config_and_its_dictionary_are_the_same() -> None:
    for config in CONFIGS.values():
        assert isinstance(config, LokrConfig | LycorisConfig)
        assert type(config).from_dict(config.to_dict()) == dataclasses.replace(config)
