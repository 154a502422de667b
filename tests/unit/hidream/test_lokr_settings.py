"""LoKr's dropouts, DoRA and start near the weights, against plain formulas in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from reverie_hidream.adapters import AdapterConfigError, LokrConfig, LokrPreset, LycorisConfig, attach_adapter
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.transformer import enable_gradient_checkpointing, predict_velocity
from torch.nn import functional

MakeTransformer = Callable[..., HiDreamImageTransformer2DModel]
MakeConditioning = Callable[..., TextConditioning]

V = "single_stream_blocks.1.block.attn1.to_v"
NAME = f"lycoris_{V.replace('.', '_')}"
ONE = LokrPreset(target_name=(V,))


def hidden_states(rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def stir(adapter: Any, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor += size * torch.randn(tensor.shape, generator=generator)


def attached(make_transformer: MakeTransformer, **settings: Any) -> tuple[Any, Any, torch.Tensor]:
    """The adapted layer, its adapter, and the dense change at full strength."""
    transformer = make_transformer()
    adapter = attach_adapter(
        transformer, LokrConfig(factor=4, apply_preset=ONE, **settings), dtype=torch.float64, seed=11
    )
    stir(adapter)
    state = adapter.raw_state()
    return transformer.get_submodule(V), adapter, torch.kron(state[f"{NAME}.lokr_w1"], state[f"{NAME}.lokr_w2"])


def change(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = (layer(hidden) - functional.linear(hidden, layer.weight, layer.bias)).detach()
    return result


def test_dropout_leaves_out_elements_of_the_change_and_scales_the_others(make_transformer: MakeTransformer) -> None:
    layer, adapter, dense = attached(make_transformer, dropout=0.25)
    whole = hidden_states() @ dense.T

    dropped = change(layer, hidden_states())

    kept = dropped.abs() > 1e-9
    assert torch.allclose(dropped[kept], whole[kept] / 0.75)
    assert abs(float(kept.double().mean()) - 0.75) < 0.04
    adapter.train(False)
    assert torch.allclose(change(layer, hidden_states()), whole)


def test_rank_dropout_leaves_out_rows_of_the_weight_s_change(make_transformer: MakeTransformer) -> None:
    layer, _, dense = attached(make_transformer, rank_dropout=0.5)

    dropped = change(layer, hidden_states())

    kept = dropped.abs().sum(0) > 1e-9
    assert 4 < int(kept.sum()) < 28
    assert torch.allclose(dropped, hidden_states() @ (dense * kept[:, None]).T)


def test_module_dropout_leaves_out_whole_micro_batches_but_no_gradient(make_transformer: MakeTransformer) -> None:
    layer, adapter, dense = attached(make_transformer, module_dropout=0.3)
    num_left_out = 0

    for step in range(200):
        adapter.begin_step(step, 0)
        is_left_out = bool((change(layer, hidden_states(2)).abs() < 1e-9).all())
        num_left_out += is_left_out
        assert is_left_out or torch.allclose(change(layer, hidden_states(2)), hidden_states(2) @ dense.T)

    assert 40 < num_left_out < 80
    adapter.begin_step(next(s for s in range(200) if _left_out(adapter, layer, s)), 0)
    layer(hidden_states(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def _left_out(adapter: Any, layer: Any, step: int) -> bool:
    adapter.begin_step(step, 0)
    return bool((change(layer, hidden_states(2)).abs() < 1e-9).all())


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"rank_dropout": 0.5}, {"module_dropout": 0.5}])
def test_dropouts_are_functions_of_seed_step_and_micro_batch(
    settings: dict[str, float], make_transformer: MakeTransformer
) -> None:
    layer, adapter, _ = attached(make_transformer, **settings)

    def at(step: int, micro_batch: int) -> torch.Tensor:
        adapter.begin_step(step, micro_batch)
        return change(layer, hidden_states())

    places = [(step, micro_batch) for step in range(12) for micro_batch in range(2)]
    first = [at(*place) for place in places]
    again = [at(*place) for place in reversed(places)][::-1]

    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({float(one.sum()) for one in first[::2]}) > 1
    assert any(not torch.equal(first[index], first[index + 1]) for index in range(0, len(first), 2))


def test_recomputed_blocks_find_the_masks_of_their_forward_pass(
    make_transformer: MakeTransformer, make_conditioning: MakeConditioning
) -> None:
    gradients = []
    for is_recomputed in (False, True):
        transformer = make_transformer()
        config = LokrConfig(factor=4, dropout=0.3, rank_dropout=0.2, module_dropout=0.2)
        adapter = attach_adapter(transformer, config, dtype=torch.float64)
        stir(adapter)
        enable_gradient_checkpointing(transformer, is_recomputed)
        latents = torch.randn(1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        predict_velocity(transformer, latents, torch.tensor([500.0]), make_conditioning()).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None]))

    assert torch.equal(*gradients)


def test_dylora_trains_one_block_of_ranks_at_a_time(make_transformer: MakeTransformer) -> None:
    transformer = make_transformer()
    config = LycorisConfig(algo="dylora", linear_dim=8, linear_alpha=4.0, block_size=2, apply_preset=ONE)
    adapter = attach_adapter(transformer, config, dtype=torch.float64)
    stir(adapter)
    layer = transformer.get_submodule(V)
    up, down = (adapter.raw_state()[f"{NAME}.lora_{end}.weight"] for end in ("up", "down"))
    ends = set()

    for step in range(40):
        adapter.begin_step(step, 0)
        for parameter in adapter.parameters():
            parameter.grad = None
        layer(hidden_states(3)).sum().backward()
        gradient = adapter.named_parameters()[f"{NAME}.lora_down.weight"].grad
        assert gradient is not None
        trained = (gradient.abs().sum(1) > 0).nonzero().flatten().tolist()
        assert trained == [trained[0], trained[0] + 1]
        end = trained[-1] + 1
        ends.add(end)
        expected = hidden_states(3) @ (4.0 / end * up[:, :end] @ down[:end]).T
        assert torch.allclose(change(layer, hidden_states(3)), expected)
    assert ends == {2, 4, 6, 8}


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_dora_is_its_formula_on_the_weight_as_it_is_held(precision: str, make_transformer: MakeTransformer) -> None:
    transformer = make_transformer(torch.float32, precision)
    layer: Any = transformer.get_submodule(V)
    weight = layer.weight.dequantize() if precision != "no_change" else layer.weight
    adapter = attach_adapter(transformer, LokrConfig(factor=4, dora_wd=True, apply_preset=ONE))
    assert torch.allclose(adapter.raw_state()[f"{NAME}.dora_scale"], weight.norm(dim=1, keepdim=True))
    stir(adapter)
    state = {name.removeprefix(f"{NAME}."): tensor.double() for name, tensor in adapter.raw_state().items()}

    changed = weight.double() + torch.kron(state["lokr_w1"], state["lokr_w2"])
    expected = state["dora_scale"] * changed / changed.norm(dim=1, keepdim=True)
    result = layer(hidden_states().float())

    assert torch.allclose(result.double(), functional.linear(hidden_states(), expected, layer.bias.double()), atol=1e-4)


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
@pytest.mark.parametrize("use_scalar", [False, True])
def test_init_lokr_norm_follows_the_statistics_of_the_weight(
    precision: str, use_scalar: bool, make_transformer: MakeTransformer
) -> None:
    transformer = make_transformer(torch.float32, precision)
    layer: Any = transformer.get_submodule(V)
    weight = (layer.weight.dequantize() if precision != "no_change" else layer.weight).double()
    base = layer(hidden_states().float())
    config = LokrConfig(factor=4, init_lokr_norm=1e-3, use_scalar=use_scalar, apply_preset=ONE)
    adapter = attach_adapter(transformer, config)
    state = adapter.raw_state()
    w1, w2 = state[f"{NAME}.lokr_w1"].double(), state[f"{NAME}.lokr_w2"].double()

    assert torch.equal(w1, torch.ones(4, 4, dtype=torch.float64))
    assert float(w2.std() / weight.std()) == pytest.approx(1e-3, rel=1e-4)
    assert float(w2.mean() - 1e-3 * weight.mean()) == pytest.approx(0.0, abs=1e-9)
    assert torch.equal(layer(hidden_states().float()), base) == use_scalar


def test_init_lokr_norm_is_refused_where_w2_is_split(make_transformer: MakeTransformer) -> None:
    config = LokrConfig(factor=2, full_matrix=False, linear_dim=2, init_lokr_norm=1e-3, apply_preset=ONE)

    with pytest.raises(AdapterConfigError, match=r"needs whole factors, .* 1 modules .*; set full_matrix"):
        attach_adapter(make_transformer(), config)
