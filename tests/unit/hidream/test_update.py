"""One step of an adapter's update: whole, and released parameter by parameter in the backward pass."""

import math
from collections.abc import Iterator

import pytest
import torch
from reverie_common.optimizer_catalogue import CATALOGUE
from reverie_hidream.optimizers import (
    OPTIMIZERS,
    AdapterUpdate,
    GradientFigures,
    NonFiniteLossError,
    UpdateSettings,
    build_update,
    parameter_dtype,
)
from torch import nn

RELEASABLE = [name for name, entry in CATALOGUE.items() if entry.can_release]


class TwoFactors(nn.Module):
    """x -> (w2 (w1 x)) * scalar: as a LoKr, each product needs the other's tensors in the backward pass."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w1 = nn.Parameter(torch.randn((96, 64), generator=generator).to(dtype) / 8)
        self.w2 = nn.Parameter(torch.randn((64, 96), generator=generator).to(dtype) / 8)
        self.scalar = nn.Parameter(torch.tensor(1.0, dtype=dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs @ self.w1.t() @ self.w2.t()) * self.scalar


def loss_of(model: TwoFactors, step: int, scale: float = 30.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn((8, 64), generator=generator)
    outputs: torch.Tensor = model(inputs.to(model.w1.dtype))
    return scale * (outputs.float() - inputs).square().mean()


def take_steps(update: AdapterUpdate, model: TwoFactors, steps: range) -> Iterator[GradientFigures]:
    for step in steps:
        update.begin(1e-2 / (step + 1))
        loss = loss_of(model, step)
        update.accept(loss)
        loss.backward()
        yield update.finish(loss.detach())


def trained(settings: UpdateSettings, num_steps: int = 5) -> tuple[TwoFactors, AdapterUpdate, list[GradientFigures]]:
    model = TwoFactors(parameter_dtype(settings.optimizer))
    update = build_update(list(model.parameters()), settings)
    return model, update, list(take_steps(update, model, range(num_steps)))


def are_equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", RELEASABLE)
@pytest.mark.parametrize("limit", [0.0, 0.01])
def test_released_steps_are_the_whole_ones_to_the_last_bit(name: str, limit: float) -> None:
    whole, _, figures = trained(UpdateSettings(optimizer=name, clip_limit=limit, seed=4))
    released, _, released_figures = trained(
        UpdateSettings(optimizer=name, clip_limit=limit, seed=4, gradient_release=True)
    )

    assert are_equal(whole, released)
    assert not are_equal(released, TwoFactors(parameter_dtype(name)))
    assert [figure.norm for figure in released_figures] == pytest.approx([figure.norm for figure in figures])
    assert [figure.absmax for figure in released_figures] == [figure.absmax for figure in figures]


def test_a_released_gradient_is_gone_before_the_backward_pass_is_over() -> None:
    model = TwoFactors()
    update = build_update(list(model.parameters()), UpdateSettings(gradient_release=True))
    held: list[int] = []

    def count(parameter: torch.Tensor) -> None:
        held.append(sum(other.grad is not None for other in model.parameters()))

    # Called after the update's own hook: by then the gradient has been used and freed.
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    list(take_steps(update, model, range(1)))

    assert held == [0, 0, 0]


def test_whole_gradients_are_there_until_the_step() -> None:
    model = TwoFactors()
    update = build_update(list(model.parameters()), UpdateSettings())
    loss_of(model, 0).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))

    update.finish(torch.tensor(1.0))

    assert all(parameter.grad is None for parameter in model.parameters())


def test_figures_are_those_before_clipping() -> None:
    model = TwoFactors()
    loss_of(model, 0).backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    _, _, [figures] = trained(UpdateSettings(clip_limit=1e-4), num_steps=1)

    assert figures.loss == pytest.approx(loss_of(TwoFactors(), 0).item())
    assert figures.norm == pytest.approx(gradients.double().norm().item(), rel=1e-6)
    assert figures.absmax == gradients.abs().max().item()


def test_the_rate_of_the_step_is_used() -> None:
    model = TwoFactors()
    before = model.w1.detach().clone()
    update = build_update([model.w1], UpdateSettings(optimizer="optimi-sgd", learning_rate=1.0, clip_limit=0.0))
    update.begin(0.25)
    loss_of(model, 0).backward()
    assert model.w1.grad is not None
    expected = before - 0.25 * model.w1.grad

    update.finish(torch.tensor(1.0))

    assert torch.allclose(model.w1, expected, atol=1e-7)


@pytest.mark.parametrize("name", RELEASABLE)
def test_a_resumed_release_continues_to_the_last_bit(name: str) -> None:
    settings = UpdateSettings(optimizer=name, gradient_release=True, seed=4)
    model, update, _ = trained(settings, num_steps=3)
    state = update.tensors()
    resumed = TwoFactors(parameter_dtype(name))
    resumed.load_state_dict(model.state_dict())
    list(take_steps(update, model, range(3, 6)))

    fresh = build_update(list(resumed.parameters()), settings)
    fresh.load_tensors(state)
    list(take_steps(fresh, resumed, range(3, 6)))

    assert are_equal(model, resumed)


def test_a_released_state_is_not_a_whole_one() -> None:
    _, whole, _ = trained(UpdateSettings())
    _, released, _ = trained(UpdateSettings(gradient_release=True))

    with pytest.raises(ValueError, match="saved without gradient_release"):
        released.load_tensors(whole.tensors())
    with pytest.raises(ValueError, match="incomplete or of an older version"):
        whole.load_tensors(released.tensors())


def test_averaged_weights_of_a_release_are_those_of_the_whole() -> None:
    whole, whole_update, _ = trained(UpdateSettings(optimizer="adamw_schedulefree"))
    released, update, _ = trained(UpdateSettings(optimizer="adamw_schedulefree", gradient_release=True))
    before = [parameter.detach().clone() for parameter in released.parameters()]

    with whole_update.averaged(), update.averaged():
        assert are_equal(whole, released)
        assert not torch.equal(before[0], released.w1)

    assert torch.equal(before[0], released.w1)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_a_release_before_it_does_harm(value: float) -> None:
    model = TwoFactors()
    update = build_update(list(model.parameters()), UpdateSettings(gradient_release=True))
    update.begin(1e-2)

    with pytest.raises(NonFiniteLossError, match=r"the loss is (inf|nan); the adapter is unchanged"):
        update.accept(torch.tensor(value))

    assert are_equal(model, TwoFactors())


def test_a_gradient_that_is_not_finite_leaves_the_whole_adapter_as_it_was() -> None:
    model = TwoFactors()
    update = build_update(list(model.parameters()), UpdateSettings())
    update.begin(1e-2)
    loss_of(model, 0).backward()
    assert model.scalar.grad is not None
    model.scalar.grad.fill_(math.nan)

    with pytest.raises(NonFiniteLossError, match="norm of its gradient nan; the adapter is unchanged"):
        update.finish(torch.tensor(1.0))

    assert are_equal(model, TwoFactors())
    assert model.w1.grad is None


def test_a_gradient_that_is_not_finite_is_owned_up_to_by_a_release() -> None:
    model = TwoFactors()
    update = build_update(list(model.parameters()), UpdateSettings(gradient_release=True))
    update.begin(1e-2)
    (model.w1.sum() * torch.tensor(math.inf)).backward()

    with pytest.raises(NonFiniteLossError, match="the adapter is spoilt; go on from the last checkpoint"):
        update.finish(torch.tensor(1.0))


def test_a_step_without_gradients_has_none() -> None:
    for is_released in (False, True):
        update = build_update(list(TwoFactors().parameters()), UpdateSettings(gradient_release=is_released))
        update.begin(1e-2)

        assert update.finish(torch.tensor(2.0)) == GradientFigures(2.0, 0.0, 0.0)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in RELEASABLE])
def test_refuses_to_release_what_needs_all_gradients(name: str) -> None:
    with pytest.raises(ValueError, match=f"gradient_release: {name} needs all gradients"):
        UpdateSettings(optimizer=name, gradient_release=True)


def test_refuses_release_with_accumulation_and_with_norm_clipping() -> None:
    with pytest.raises(ValueError, match="4 micro-batches would be as many steps"):
        UpdateSettings(gradient_release=True, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="clip by value, or set 0"):
        UpdateSettings(gradient_release=True, clip_method="norm")
