"""Attaching, training state and export of a LoKr."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from lycoris import LycorisNetwork
from reverie_hidream.adapters import (
    AdapterMatchesNothingError,
    LokrAdapter,
    LokrConfig,
    LokrOverrides,
    LokrPreset,
    attach_lokr,
)
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.transformer import predict_velocity
from safetensors import safe_open
from safetensors.torch import load
from torch import nn

MakeTransformer = Callable[..., HiDreamImageTransformer2DModel]
MakeConditioning = Callable[..., TextConditioning]
Predict = Callable[[Any], torch.Tensor]


@pytest.fixture(scope="module")
def predict(make_conditioning: MakeConditioning) -> Predict:
    """The velocity of one fixed input."""
    latents = torch.randn(1, 4, 4, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def run(transformer: Any) -> torch.Tensor:
        dtype = transformer.x_embedder.proj.bias.dtype
        return predict_velocity(transformer, latents, torch.tensor([500.0]), make_conditioning(dtype=dtype))

    return run


def randomise(adapter: LokrAdapter, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))


def lycoris_preset() -> dict[str, Any]:
    names = ("TARGET_REPLACE_MODULE", "NAME_ALGO_MAP", "MODULE_ALGO_MAP", "USE_FNMATCH", "TARGET_EXCLUDE_NAME")
    return {name: getattr(LycorisNetwork, name) for name in names}


def names_config(*patterns: str, **preset: Any) -> LokrConfig:
    overrides = {pattern: LokrOverrides(factor=4) for pattern in patterns}
    return LokrConfig(factor=8, apply_preset=LokrPreset(name_algo_map=overrides, use_fnmatch=True, **preset))


@pytest.mark.parametrize("alias", ["Attention", "HiDreamAttention"])
def test_class_names_of_other_hidream_code_select_diffusers_classes(
    alias: str, make_transformer: MakeTransformer
) -> None:
    adapter = attach_lokr(make_transformer(), LokrConfig(factor=4, apply_preset=LokrPreset(target_module=(alias,))))

    # 8 Linears of the double block, 4 of each single block.
    assert adapter.num_modules == 16
    assert adapter.selected[0] == "double_stream_blocks.0.block.attn1.to_q"
    assert all(".attn1." in name for name in adapter.selected)


@pytest.mark.parametrize(("alias", "num_modules"), [("FeedForward", 3 + 3 * 5 * 3), ("MOEFeedForward", 3 * 5 * 3)])
def test_feed_forward_aliases_reach_the_experts(
    alias: str, num_modules: int, make_transformer: MakeTransformer
) -> None:
    adapter = attach_lokr(make_transformer(), LokrConfig(factor=4, apply_preset=LokrPreset(target_module=(alias,))))

    assert adapter.num_modules == num_modules
    assert any(".experts." in name for name in adapter.selected)


def test_names_alone_select_nothing_else(make_transformer: MakeTransformer) -> None:
    """LyCORIS would adapt every Linear of a plain model here (spec 4.2, variant 3)."""
    adapter = attach_lokr(make_transformer(), names_config("single_stream_blocks.*.block.attn*"))

    assert adapter.num_modules == 8
    assert all(name.startswith("single_stream_blocks.") for name in adapter.selected)


def test_excluded_names_are_left_out(make_transformer: MakeTransformer) -> None:
    adapter = attach_lokr(
        make_transformer(), names_config("single_stream_blocks.*.block.attn*", exclude_name=("*.to_out",))
    )

    assert adapter.num_modules == 6


def test_overrides_shape_the_factors(make_transformer: MakeTransformer) -> None:
    adapter = attach_lokr(make_transformer(), names_config("*.0.block.attn1.to_q"))

    assert adapter.raw_state()["lycoris_single_stream_blocks_0_block_attn1_to_q.lokr_w1"].shape == (4, 4)


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_selects_the_same_on_plain_and_quantised_models(precision: str, make_transformer: MakeTransformer) -> None:
    transformer = make_transformer(torch.float32, precision)

    for config, num_modules in ((LokrConfig(factor=4), 16), (names_config("*.ff_t*", "*.shared_experts*"), 12)):
        adapter = attach_lokr(transformer, config)
        assert adapter.num_modules == num_modules
        adapter.detach()


def test_a_selection_without_match_says_what_there_is(make_transformer: MakeTransformer) -> None:
    config = LokrConfig(apply_preset=LokrPreset(target_module=("Atention",)))

    with pytest.raises(AdapterMatchesNothingError) as caught:
        attach_lokr(make_transformer(), config)

    assert "['Atention']" in str(caught.value)
    assert "HiDreamAttention" in str(caught.value)
    assert "Attention for HiDreamAttention" in str(caught.value)
    assert "double_stream_blocks.0" in str(caught.value)


def test_lycoris_s_process_wide_preset_is_put_back(make_transformer: MakeTransformer) -> None:
    before = lycoris_preset()

    attach_lokr(make_transformer(), names_config("*.attn1.to_q"))
    with pytest.raises(AdapterMatchesNothingError):
        attach_lokr(make_transformer(), names_config("nothing"))

    assert lycoris_preset() == before


def test_an_earlier_selection_does_not_leak_into_the_next(make_transformer: MakeTransformer) -> None:
    attach_lokr(make_transformer(), names_config("*.ff_t*"))

    assert attach_lokr(make_transformer(), LokrConfig(factor=4)).num_modules == 16


@pytest.mark.parametrize("use_scalar", [False, True])
def test_a_new_adapter_changes_nothing(use_scalar: bool, make_transformer: MakeTransformer, predict: Predict) -> None:
    transformer = make_transformer()
    expected = predict(transformer)

    attach_lokr(transformer, LokrConfig(factor=4, use_scalar=use_scalar), dtype=torch.float64)

    assert torch.equal(predict(transformer), expected)


@pytest.mark.parametrize(("use_scalar", "first"), [(False, "lokr_w2"), (True, "scalar")])
def test_at_the_first_step_only_the_zero_factor_has_a_gradient(
    use_scalar: bool, first: str, make_transformer: MakeTransformer, predict: Predict
) -> None:
    transformer = make_transformer()
    adapter = attach_lokr(transformer, LokrConfig(factor=4, use_scalar=use_scalar), dtype=torch.float64)

    predict(transformer).square().sum().backward()

    moved = {
        name for name, tensor in adapter.named_parameters().items() if tensor.grad is not None and tensor.grad.any()
    }
    assert moved == {name for name in adapter.named_parameters() if name.endswith(first)}


def test_the_start_depends_on_the_seed_alone(make_transformer: MakeTransformer) -> None:
    config, transformer = LokrConfig(factor=4), make_transformer()
    torch.manual_seed(1)
    first = attach_lokr(transformer, config, seed=5).raw_state()
    torch.manual_seed(2)
    state_of_torch = torch.get_rng_state()
    second = attach_lokr(transformer, config, seed=5).raw_state()
    other = attach_lokr(transformer, config, seed=6).raw_state()

    name = "lycoris_double_stream_blocks_0_block_attn1_to_q.lokr_w1"
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert torch.equal(torch.get_rng_state(), state_of_torch)


def test_the_model_keeps_its_names_and_gains_no_parameters(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer()
    names = list(transformer.state_dict())

    adapter = attach_lokr(transformer, LokrConfig(factor=4, use_scalar=True))

    assert list(transformer.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert adapter.num_parameters == sum(tensor.numel() for tensor in adapter.parameters())
    assert len(adapter.parameters()) == 3 * 16


def test_detach_restores_every_forward_exactly(make_transformer: MakeTransformer, predict: Predict) -> None:
    transformer = make_transformer()
    expected = predict(transformer)
    adapter = attach_lokr(transformer, LokrConfig(factor=4), dtype=torch.float64)
    randomise(adapter)
    assert not torch.equal(predict(transformer), expected)

    adapter.detach()
    adapter.detach()

    assert torch.equal(predict(transformer), expected)
    assert not any("forward" in vars(module) for module in transformer.modules())


def test_two_adapters_add_up_and_come_off_in_any_order(make_transformer: MakeTransformer, predict: Predict) -> None:
    transformer = make_transformer()
    first = attach_lokr(transformer, LokrConfig(factor=4), dtype=torch.float64)
    randomise(first)
    with_first = predict(transformer)
    second = attach_lokr(transformer, LokrConfig(factor=8), dtype=torch.float64)
    randomise(second, seed=1)
    with_both = predict(transformer)

    first.detach()
    with_second = predict(transformer)
    second.detach()
    third = attach_lokr(transformer, LokrConfig(factor=4), dtype=torch.float64)
    third.load_raw_state(first.raw_state())

    assert torch.equal(predict(transformer), with_first)
    assert not torch.allclose(with_both, with_first)
    assert not torch.allclose(with_both, with_second)


def test_strength_scales_the_change_and_zero_is_the_base(
    make_transformer: MakeTransformer,
) -> None:
    transformer = make_transformer()
    layer = transformer.single_stream_blocks[0].block.attn1.to_q
    hidden = torch.randn(3, layer.in_features, dtype=torch.float64)
    base = layer(hidden)
    adapter = attach_lokr(transformer, LokrConfig(factor=4, multiplier=0.5), dtype=torch.float64)
    randomise(adapter)
    full = layer(hidden) - base

    adapter.set_strength(0.25)
    quarter = layer(hidden) - base
    adapter.set_strength(0.0)

    assert torch.allclose(quarter, 0.25 * full, atol=1e-12)
    assert torch.equal(layer(hidden), base)


@pytest.mark.parametrize(
    "config",
    [
        LokrConfig(factor=4, use_scalar=True),
        LokrConfig(factor=4, full_matrix=False, linear_dim=2, linear_alpha=0.5),
        LokrConfig(factor=8, full_matrix=False, linear_dim=3, linear_alpha=1.5, decompose_both=True),
    ],
)
def test_the_change_is_the_kronecker_product(config: LokrConfig, make_transformer: MakeTransformer) -> None:
    transformer = make_transformer()
    adapter = attach_lokr(transformer, config, dtype=torch.float64)
    randomise(adapter)
    name = "double_stream_blocks.0.block.ff_t.w1"
    config_all = LokrConfig(
        factor=config.factor,
        full_matrix=config.full_matrix,
        linear_dim=config.linear_dim,
        linear_alpha=config.linear_alpha,
        decompose_both=config.decompose_both,
        use_scalar=config.use_scalar,
        apply_preset=LokrPreset(target_name=(name,)),
    )
    adapter.detach()
    adapter = attach_lokr(transformer, config_all, dtype=torch.float64)
    randomise(adapter)
    state = {key.rsplit(".", 1)[1]: tensor for key, tensor in adapter.raw_state().items()}
    layer: Any = transformer.get_submodule(name)
    hidden = torch.randn(2, 7, layer.in_features, dtype=torch.float64)

    w1 = state["lokr_w1"] if "lokr_w1" in state else state["lokr_w1_a"] @ state["lokr_w1_b"]
    w2 = state["lokr_w2"] if "lokr_w2" in state else state["lokr_w2_a"] @ state["lokr_w2_b"]
    scale = 1.0 if config.full_matrix else config.linear_alpha / config.linear_dim
    change = scale * state.get("scalar", torch.tensor(1.0)) * torch.kron(w1, w2)

    expected = nn.functional.linear(hidden, layer.weight + change)
    assert torch.allclose(layer(hidden), expected, atol=1e-10)


def test_a_bfloat16_layer_keeps_its_dtype_with_a_float32_adapter(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer(torch.bfloat16)
    adapter = attach_lokr(transformer, LokrConfig(factor=4))
    randomise(adapter)
    hidden = torch.randn(3, 32, dtype=torch.bfloat16, requires_grad=True)

    output = transformer.single_stream_blocks[0].block.attn1.to_q(hidden)
    output.float().sum().backward()

    assert output.dtype == torch.bfloat16
    parameter = adapter.named_parameters()["lycoris_single_stream_blocks_0_block_attn1_to_q.lokr_w2"]
    assert parameter.grad is not None
    assert parameter.grad.dtype == torch.float32


def test_the_raw_state_restores_scalars_to_the_last_bit(make_transformer: MakeTransformer) -> None:
    config = LokrConfig(factor=4, use_scalar=True)
    adapter, other = (attach_lokr(make_transformer(), config, seed=seed) for seed in (0, 1))
    randomise(adapter)
    state = adapter.raw_state()

    other.load_raw_state(state)
    randomise(adapter, seed=9)

    assert state.keys() == other.raw_state().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in other.raw_state().items())
    assert any(name.endswith(".scalar") for name in state)


def test_the_raw_state_of_another_configuration_is_refused_whole(make_transformer: MakeTransformer) -> None:
    plain = attach_lokr(make_transformer(), LokrConfig(factor=4))
    with_scalar = attach_lokr(make_transformer(), LokrConfig(factor=4, use_scalar=True))
    other_factor = attach_lokr(make_transformer(), LokrConfig(factor=2))
    before = plain.raw_state()

    with pytest.raises(ValueError, match="16 names differ"):
        plain.load_raw_state(with_scalar.raw_state())
    with pytest.raises(ValueError, match=r"lokr_w1 has shape \(2, 2\), expected \(4, 4\)"):
        plain.load_raw_state(other_factor.raw_state())

    assert all(torch.equal(before[name], tensor) for name, tensor in plain.raw_state().items())


def test_the_file_is_that_of_the_specification(make_transformer: MakeTransformer, tmp_path: Any) -> None:
    config = LokrConfig(factor=4, use_scalar=True)
    adapter = attach_lokr(make_transformer(), config)
    randomise(adapter)
    state = adapter.raw_state()

    body = adapter.export({"modelspec.title": "quickstart"}, dtype=torch.float32)

    tensors = load(body)
    name = "lycoris_double_stream_blocks_0_block_attn1_to_q"
    assert {key.rsplit(".", 1)[1] for key in tensors} == {"alpha", "lokr_w1", "lokr_w2"}
    assert len(tensors) == 3 * adapter.num_modules
    assert tensors[f"{name}.alpha"].shape == ()
    assert tensors[f"{name}.alpha"].item() == 16384.0
    assert torch.equal(tensors[f"{name}.lokr_w1"], state[f"{name}.lokr_w1"] * state[f"{name}.scalar"])
    assert torch.equal(tensors[f"{name}.lokr_w2"], state[f"{name}.lokr_w2"])
    (tmp_path / "adapter.safetensors").write_bytes(body)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lycoris_config"]) == config.to_dict()
        assert file.metadata()["modelspec.title"] == "quickstart"


def test_the_file_is_bfloat16_unless_asked_otherwise(make_transformer: MakeTransformer) -> None:
    tensors = load(attach_lokr(make_transformer(), LokrConfig(factor=4)).export())

    assert {tensor.dtype for key, tensor in tensors.items() if "lokr" in key} == {torch.bfloat16}


def test_the_same_state_and_metadata_give_the_same_bytes(make_transformer: MakeTransformer) -> None:
    metadata = {f"key{index}": str(index) for index in range(20)}
    bodies = []
    for order in (list(metadata), list(reversed(metadata))):
        adapter = attach_lokr(make_transformer(), LokrConfig(factor=4, use_scalar=True))
        randomise(adapter)
        bodies.append(adapter.export({key: metadata[key] for key in order}))

    assert bodies[0] == bodies[1]


def test_lycoris_stays_quiet_and_we_log_the_counts(
    make_transformer: MakeTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    transformer = make_transformer()
    caplog.set_level(logging.INFO)

    adapter = attach_lokr(transformer, LokrConfig(factor=4))

    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"adapter on 16 Linears with {adapter.num_parameters} parameters"]
