"""The load-balancing loss: its value and its live gradient, against float64 loops over diffusers' gates (spec 2.3)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reverie_hidream.adapters import LokrConfig, attach_lokr
from reverie_hidream.moe import RouterUse, Routing, load_balancing_loss, router_use
from reverie_hidream.optimizers import UpdateSettings, build_update
from reverie_hidream.training.batch import Batch, BatchDraws
from reverie_hidream.training.objective import ObjectiveSettings
from reverie_hidream.training.step import StepSettings, TrainingStep
from reverie_hidream.transformer import load_transformer, predict_velocity

Make = Callable[..., Any]
Error = Callable[[torch.Tensor, torch.Tensor], float]

NUM_EXPERTS, PER_TOKEN, NUM_LAYERS = 4, 2, 4


def _batch(made: Any, **fields: Any) -> Batch:
    draws = BatchDraws(noise=made.noise, sigmas=made.sigmas)
    return Batch(latents=made.latents, draws=draws, conditioning=made.text, **fields)


def _use(scores: torch.Tensor, counts: torch.Tensor) -> RouterUse:
    weights, experts = torch.topk(scores, PER_TOKEN, dim=-1)
    return router_use(Routing(weights, experts, scores), counts)


def _loop(scores: torch.Tensor, counts: list[float]) -> tuple[torch.Tensor, list[float], float]:
    """sum_e P_e f_e, the shares and the entropy of one layer, token by token. scores: (T, E)."""
    total = len(scores) // len(counts) * sum(counts)
    mean_scores = [torch.zeros((), dtype=torch.float64) for _ in range(NUM_EXPERTS)]
    shares = [0.0] * NUM_EXPERTS
    entropy = 0.0
    for token, row in enumerate(scores):
        count = counts[token % len(counts)]
        values = row.detach().tolist()
        chosen = sorted(range(NUM_EXPERTS), key=lambda expert: values[expert])[-PER_TOKEN:]
        for expert in range(NUM_EXPERTS):
            mean_scores[expert] = mean_scores[expert] + row[expert] * count / total
            entropy -= values[expert] * float(row[expert].detach().log()) * count / total
        for expert in chosen:
            shares[expert] += count / (total * PER_TOKEN)
    loss = sum((mean_scores[expert] * NUM_EXPERTS * shares[expert] for expert in range(NUM_EXPERTS)), torch.zeros(()))
    return loss, shares, entropy


def test_a_layer_s_figures_are_those_of_a_plain_loop() -> None:
    draw = torch.Generator().manual_seed(2)
    scores = torch.randn(14, NUM_EXPERTS, generator=draw, dtype=torch.float64).softmax(dim=-1).requires_grad_(True)
    counts = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.5]
    use = _use(scores, torch.tensor(counts))
    loss, shares, entropy = _loop(scores, counts)
    assert use.shares.tolist() == pytest.approx(shares)
    assert float(use.entropy) == pytest.approx(entropy)
    found = load_balancing_loss([use])
    assert float(found.detach()) == pytest.approx(float(loss.detach()))
    gradient, expected = (torch.autograd.grad(value, scores)[0] for value in (found, loss))
    assert torch.allclose(gradient, expected, atol=1e-14)
    assert not use.shares.requires_grad
    assert not use.entropy.requires_grad


def test_the_loss_is_1_in_balance_and_as_many_as_experts_share_all_otherwise() -> None:
    balanced = torch.eye(NUM_EXPERTS, dtype=torch.float64).repeat(3, 1) * 0.6 + 0.1
    assert float(load_balancing_loss([_use(balanced, torch.ones(12))])) == pytest.approx(1.0)
    collapsed = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64).repeat(12, 1)
    assert float(load_balancing_loss([_use(collapsed, torch.ones(12))])) == pytest.approx(2.0)


class _GateInputs:
    """Records what each of diffusers' gates is given."""

    def __init__(self, model: Any) -> None:
        blocks = (*model.double_stream_blocks, *model.single_stream_blocks)
        self.gates = [block.block.ff_i.gate for block in blocks]
        self.inputs: list[torch.Tensor] = []
        for gate in self.gates:
            gate.register_forward_pre_hook(self._record)

    def _record(self, module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        self.inputs.append(arguments[0])

    def loss(self) -> tuple[torch.Tensor, list[list[float]], list[float]]:
        """The loss, and each layer's shares and entropy, over the padded sequence as diffusers has it."""
        parts = []
        for gate, hidden in zip(self.gates, self.inputs, strict=True):
            scores = (hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.t()).softmax(dim=-1)
            parts.append(_loop(scores, [1.0]))
        losses, shares, entropies = zip(*parts, strict=True)
        return torch.stack(losses).mean(), list(shares), list(entropies)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=["square", "padded"])
def test_value_and_gradient_equal_a_loop_over_diffusers_gates(
    make_trainee: Make,
    make_training_reference: Make,
    make_batch: Make,
    relative_error: Error,
    size: tuple[int, int],
    checkpointing: bool,
) -> None:
    made = make_batch(*size, batch_size=1)
    reference = make_training_reference()
    inputs = _GateInputs(reference.model)
    level = made.sigmas.view(-1, 1, 1, 1)
    velocity = reference.velocity((1 - level) * made.latents + level * made.noise, made.sigmas, made.text)
    balance, shares, entropies = inputs.loss()
    flow = (velocity - (made.noise - made.latents)).square().mean()
    expected = reference.gradient(flow + 3.0 * balance)

    trainee = make_trainee(use_load_balancing_loss=True, load_balancing_loss_weight=3.0, checkpointing=checkpointing)
    result = trainee.step.train_step(1, [_batch(made)])

    assert result.load_balancing_loss == pytest.approx(float(balance.detach()), rel=1e-6)
    assert result.loss == pytest.approx(float(flow.detach()), rel=1e-6)
    assert relative_error(trainee.gradient(), expected) < 1e-7
    means = torch.tensor(shares, dtype=torch.float64).mean(dim=0)
    assert list(result.expert_load) == pytest.approx(means.tolist(), rel=1e-6)
    assert result.router_entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-6)


def test_the_weight_counts_once_and_the_gradient_is_alive(
    make_trainee: Make, make_batch: Make, relative_error: Error
) -> None:
    made = make_batch(8, 8)
    gradients = []
    for weight in (0.0, 1.0, 2.0):
        trainee = make_trainee(use_load_balancing_loss=True, load_balancing_loss_weight=weight)
        trainee.step.train_step(1, [_batch(made)])
        gradients.append(trainee.gradient())
    off, once, twice = gradients
    # Rotary embeddings pass gradients on in float32.
    assert relative_error(twice - off, 2 * (once - off)) < 1e-6
    assert float((once - off).norm()) > 1e-4 * float(off.norm())


def test_accumulation_takes_the_mean(make_trainee: Make, make_batch: Make, relative_error: Error) -> None:
    made = make_batch(8, 8)
    settings = {"use_load_balancing_loss": True, "load_balancing_loss_weight": 5.0}
    one, two = make_trainee(**settings), make_trainee(num_batches=2, **settings)
    single = one.step.train_step(1, [_batch(made)])
    double = two.step.train_step(1, [_batch(made), _batch(made)])
    assert double.load_balancing_loss == pytest.approx(single.load_balancing_loss, rel=1e-6)
    assert relative_error(two.gradient(), one.gradient()) < 1e-12


def test_a_regularisation_batch_keeps_its_router(make_trainee: Make, make_batch: Make) -> None:
    made = make_batch(8, 8)
    with_loss = make_trainee(use_load_balancing_loss=True, load_balancing_loss_weight=5.0)
    without = make_trainee()
    for trainee in (with_loss, without):
        trainee.step.train_step(1, [_batch(made, is_regularisation=True)])
    assert torch.equal(with_loss.gradient(), without.gradient())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_every_layer_is_counted_once(tiny_checkpoint: Path, make_batch: Make, checkpointing: bool) -> None:
    model = load_transformer(tiny_checkpoint, dtype=torch.float32)
    model.gradient_checkpointing = checkpointing
    made = make_batch(8, 8, dtype=torch.float32)
    uses: list[RouterUse] = []
    latents = made.noise.clone().requires_grad_(True)
    predict_velocity(model, latents, 1000 * made.sigmas, made.text, uses).sum().backward()
    blocks = (*model.double_stream_blocks, *model.single_stream_blocks)
    assert len(uses) == len(blocks)


def test_is_off_unless_asked_for_and_the_router_is_watched_all_the_same(make_trainee: Make, make_batch: Make) -> None:
    result = make_trainee().step.train_step(1, [_batch(make_batch(8, 8))])
    assert result.load_balancing_loss is None
    assert sum(result.expert_load) == pytest.approx(1.0, rel=1e-6)
    assert result.router_entropy is not None


def test_lowers_a_forced_imbalance_when_the_adapter_trains_with_it(tiny_checkpoint: Path, make_batch: Make) -> None:
    made = make_batch(8, 8, dtype=torch.float32)
    ends = {}
    for is_used in (False, True):
        model: Any = load_transformer(tiny_checkpoint, dtype=torch.float32)
        # Every gate sharpened, so that few experts get most of the tokens.
        for block in (*model.double_stream_blocks, *model.single_stream_blocks):
            block.block.ff_i.gate.weight.data.mul_(6.0)
        adapter = attach_lokr(model, LokrConfig(factor=4), seed=1)
        update = build_update(adapter.parameters(), UpdateSettings(learning_rate=0.02, clip_limit=0.0))
        objective = ObjectiveSettings(use_load_balancing_loss=is_used, load_balancing_loss_weight=20.0)
        settings = StepSettings(objective=objective, gradient_checkpointing=False)
        step = TrainingStep(model, adapter, update, settings, learning_rate=lambda _: 0.02)
        for number in range(1, 31):
            step.train_step(number, [_batch(made)])
        uses: list[RouterUse] = []
        level = made.sigmas.view(-1, 1, 1, 1)
        noisy = (1 - level) * made.latents + level * made.noise
        with torch.no_grad():
            predict_velocity(model, noisy, 1000 * made.sigmas, made.text, uses)
        ends[is_used] = float(load_balancing_loss(uses))
    assert ends[True] < 1 + 0.7 * (ends[False] - 1)
