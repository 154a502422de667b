"""Every optimiser of the table: what it computes, what it keeps, and that a resumed one goes on exactly."""

import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from reverie_common.optimizer_catalogue import CATALOGUE
from reverie_hidream.optimizers import (
    OPTIMIZERS,
    OptimizerOptionError,
    UnknownOptimizerError,
    averaged_weights,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_dtype,
    set_learning_rate,
)
from torch import nn

# Large enough for a state in 8 bits, a small matrix, a vector, a scalar as LoKr's.
SHAPES = [(96, 96), (4, 3), (5,), ()]
RELATIVES_OF_ADAMW = ["adamw", "torch-adamw", "bnb-adamw", "bnb-adamw-paged"]
RELATIVES_OF_LION = ["optimi-lion", "bnb-lion", "bnb-lion-paged"]


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradient_of(step: int, index: int, shape: Sequence[int]) -> torch.Tensor:
    return torch.randn(list(shape), generator=torch.Generator().manual_seed(100 * step + index))


def train(optimizer: torch.optim.Optimizer, tensors: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, tensor in enumerate(tensors):
            tensor.grad = gradient_of(step, index, tensor.shape).to(tensor.dtype)
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def are_equal(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimiser_continues_to_the_last_bit(name: str) -> None:
    straight = parameters(parameter_dtype(name))
    optimizer = build_optimizer(name, straight, learning_rate=1e-2, weight_decay=0.1, seed=5)
    train(optimizer, straight, range(4))
    saved_state = optimizer_tensors(optimizer)
    saved_parameters = copies(straight)
    train(optimizer, straight, range(4, 12))

    resumed = [nn.Parameter(tensor.clone()) for tensor in saved_parameters]
    fresh = build_optimizer(name, resumed, learning_rate=1e-2, weight_decay=0.1, seed=5)
    load_optimizer_tensors(fresh, saved_state)
    train(fresh, resumed, range(4, 12))

    assert are_equal(straight, resumed)
    assert not are_equal(straight, saved_parameters)
    ended, expected = optimizer_tensors(fresh), optimizer_tensors(optimizer)
    assert ended.keys() == expected.keys()
    assert all(torch.equal(ended[key], expected[key]) for key in expected)


def trajectory(name: str, *, num_steps: int, shape: tuple[int, ...], weight_decay: float) -> npt.NDArray[np.float64]:
    tensors = parameters(parameter_dtype(name), [shape])
    optimizer = build_optimizer(name, tensors, learning_rate=1e-2, weight_decay=weight_decay)
    train(optimizer, tensors, range(num_steps))
    return tensors[0].detach().double().numpy()


def start_of(shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    return parameters(shapes=[shape])[0].detach().double().numpy()


def adamw_in_float64(shape: tuple[int, ...], num_steps: int, weight_decay: float) -> npt.NDArray[np.float64]:
    weights = start_of(shape)
    first, second = np.zeros(shape), np.zeros(shape)
    for step in range(num_steps):
        rate, gradient = 1e-2 / (step + 1), gradient_of(step, 0, shape).double().numpy()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        direction = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
        weights = weights - rate * weight_decay * weights - rate * direction
    return weights


def lion_in_float64(shape: tuple[int, ...], num_steps: int, weight_decay: float) -> npt.NDArray[np.float64]:
    weights, average = start_of(shape), np.zeros(shape)
    for step in range(num_steps):
        rate, gradient = 1e-2 / (step + 1), gradient_of(step, 0, shape).double().numpy()
        weights = weights - rate * weight_decay * weights - rate * np.sign(0.9 * average + 0.1 * gradient)
        average = 0.99 * average + 0.01 * gradient
    return weights


@pytest.mark.parametrize("name", RELATIVES_OF_ADAMW)
def test_adamw_follows_its_formula(name: str) -> None:
    found = trajectory(name, num_steps=20, shape=(7, 9), weight_decay=0.1)

    assert np.abs(found - adamw_in_float64((7, 9), 20, 0.1)).max() < 1e-6


@pytest.mark.parametrize("name", RELATIVES_OF_LION)
def test_lion_follows_its_formula(name: str) -> None:
    found = trajectory(name, num_steps=20, shape=(7, 9), weight_decay=0.1)

    assert np.abs(found - lion_in_float64((7, 9), 20, 0.1)).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("bnb-adamw8bit", "bnb-adamw"),
        ("bnb-adamw8bit-paged", "bnb-adamw"),
        ("bnb-lion8bit", "bnb-lion"),
        ("bnb-lion8bit-paged", "bnb-lion"),
        ("bnb-ademamix8bit", "bnb-ademamix"),
        ("ao-adamw8bit", "adamw"),
        ("ao-adamwfp8", "adamw"),
        ("ao-adamw4bit", "adamw"),
    ],
)
def test_a_quantised_state_takes_nearly_the_same_path(name: str, full: str) -> None:
    shape = (128, 64)
    moved = trajectory(full, num_steps=20, shape=shape, weight_decay=0.0) - start_of(shape)
    difference = trajectory(name, num_steps=20, shape=shape, weight_decay=0.0) - start_of(shape) - moved

    # Of the way that was gone; 4 bits are coarse, and a sign that flips costs Lion a whole step.
    assert 0 < np.linalg.norm(difference) / np.linalg.norm(moved) < (0.35 if "4bit" in name else 0.15)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_finds_the_bottom_of_a_bowl(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    target = torch.randn((64, 64), generator=generator)
    tensor = nn.Parameter(torch.zeros((64, 64), dtype=parameter_dtype(name)))
    rate = 1.0 if CATALOGUE[name].finds_rate or name == "optimi-sgd" else 3e-2
    optimizer = build_optimizer(name, [tensor], learning_rate=rate, weight_decay=0.0)
    for _ in range(300):
        tensor.grad = (tensor.detach().float() - target).to(tensor.dtype)
        optimizer.step()

    with averaged_weights(optimizer):
        assert ((tensor.detach().float() - target).norm() / target.norm()).item() < 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_knows_how_much_state_there_is(name: str) -> None:
    [tensor] = parameters(parameter_dtype(name), [(160, 160)])
    optimizer = build_optimizer(name, [tensor], learning_rate=1e-2)
    train(optimizer, [tensor], range(2))
    state = {key: item for key, item in optimizer_tensors(optimizer).items() if key != "python"}
    # Tables of codes are one for all parameters; the small ones of torchao and bitsandbytes have at most 256 entries.
    num_bytes = sum(item.nbytes for key, item in state.items() if "qmap" not in key and item.numel() > 1)

    assert num_bytes / tensor.numel() == pytest.approx(CATALOGUE[name].state_bytes, rel=0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_reaches_its_optimiser(name: str) -> None:
    entry = CATALOGUE[name]
    for key, option in entry.options.items():
        changed = {bool: not option.default, int: int(option.default) + 1, float: option.default * 0.5 + 0.25}
        value = changed[type(option.default)]
        optimizer = build_optimizer(
            name,
            parameters(parameter_dtype(name)),
            learning_rate=1e-2,
            weight_decay=0.0,
            options={key: str(value)},
        )
        assert holds(optimizer, key, value), key


def entry_dtype(name: str) -> torch.dtype:
    return parameter_dtype(name)


def holds(optimizer: torch.optim.Optimizer, key: str, value: object) -> bool:
    """Whether a setting is in a group, by its own name, as one of several betas, or among bitsandbytes' arguments."""
    group = optimizer.param_groups[-1]
    settings = {**optimizer.param_groups[0], **{f"adamw_{name}": setting for name, setting in group.items()}}
    in_betas = value in settings.get("betas", ())
    return settings.get(key) == value or in_betas or getattr(getattr(optimizer, "args", None), key, None) == value


def test_a_setting_that_is_given_changes_the_step() -> None:
    coarse = parameters(shapes=[(4, 3)])
    train(build_optimizer("adamw", coarse, learning_rate=1e-2, options={"eps": "1"}), coarse, range(1))
    fine = parameters(shapes=[(4, 3)])
    train(build_optimizer("adamw", fine, learning_rate=1e-2), fine, range(1))
    gradient = gradient_of(0, 0, (4, 3))
    start = parameters(shapes=[(4, 3)])[0].detach() * (1 - 1e-2 * 0.01)

    assert torch.allclose(coarse[0], start - 1e-2 * gradient / (gradient.abs() + 1.0), atol=1e-6)
    assert torch.allclose(fine[0], start - 1e-2 * gradient.sign(), atol=1e-6)


def test_betas_and_weight_decay_reach_the_optimiser() -> None:
    adamw = build_optimizer("adamw", parameters(), learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9)
    lion = build_optimizer("optimi-lion", parameters(), learning_rate=1e-2, beta2=0.95)

    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    assert adamw.param_groups[0]["weight_decay"] == 0.3
    assert (lion.param_groups[0]["beta1"], lion.param_groups[0]["beta2"]) == (0.9, 0.95)
    assert lion.param_groups[0]["weight_decay"] == 0.0


def rounded_means(values: torch.Tensor, *, num_trials: int) -> torch.Tensor:
    """Means of what adamw_bf16 makes of weights 1 whose step is `values`, one trial in each column."""
    tensor = nn.Parameter(torch.ones((len(values), num_trials), dtype=torch.bfloat16))
    optimizer = build_optimizer("adamw_bf16", [tensor], learning_rate=1.0, weight_decay=0.0, beta1=0.0, beta2=0.0)
    # With both betas 0 the step is gradient / (|gradient| + eps): eps sets its size, exactly.
    tensor.grad = torch.ones_like(tensor)
    optimizer.param_groups[0]["eps"] = (1.0 / values - 1.0).unsqueeze(1)
    optimizer.step()
    return tensor.detach().double().mean(dim=1)


def test_stochastic_rounding_is_unbiased() -> None:
    # Below 1, bfloat16 has steps of 2**-8: rounding to nearest would lose all but the last of these.
    steps = torch.tensor([0.0001, 0.0005, 0.001, 0.0019, 0.003])
    num_trials = 40_000
    share = steps.double() * 2**8
    sigma = (share * (1 - share)).sqrt() * 2**-8 / math.sqrt(num_trials)

    means = rounded_means(steps, num_trials=num_trials)

    assert ((means - (1.0 - steps.double())).abs() < 4 * sigma).all()
    assert (means < 1.0).all()


def test_stochastic_rounding_moves_weights_that_rounding_to_nearest_would_leave() -> None:
    tensor = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = build_optimizer("adamw_bf16", [tensor], learning_rate=1e-4, weight_decay=0.0)
    nearest = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    plain = build_optimizer("adamw", [nearest], learning_rate=1e-4, weight_decay=0.0)
    for _ in range(20):
        tensor.grad, nearest.grad = torch.ones_like(tensor), torch.ones_like(nearest)
        optimizer.step()
        plain.step()

    assert tensor.detach().double().mean().item() == pytest.approx(1 - 20e-4, abs=2e-4)
    assert (nearest == 1.0).all()


def test_stochastic_rounding_depends_on_seed_step_and_parameter_and_leaves_torch_s_generator_alone() -> None:
    def rounded(seed: int, first_index: int = 0) -> torch.Tensor:
        tensors = parameters(torch.bfloat16, [(32, 32)])
        optimizer = build_optimizer("adamw_bf16", tensors, learning_rate=1e-3, seed=seed, first_index=first_index)
        train(optimizer, tensors, range(3))
        return tensors[0].detach()

    torch.manual_seed(11)
    before = torch.get_rng_state()

    assert torch.equal(rounded(1), rounded(1))
    assert not torch.equal(rounded(1), rounded(2))
    assert not torch.equal(rounded(1), rounded(1, first_index=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_stochastic_rounding_wants_bfloat16() -> None:
    with pytest.raises(ValueError, match="attach the adapter in bfloat16"):
        build_optimizer("adamw_bf16", parameters(), learning_rate=1e-2)


def test_lion_compensates_rounding_for_16_bit_weights_only() -> None:
    for dtype, compensated in ((torch.float32, False), (torch.bfloat16, True)):
        tensors = parameters(dtype)
        optimizer = build_optimizer("optimi-lion", tensors, learning_rate=1e-2)
        train(optimizer, tensors, range(1))

        assert ("00000.kahan_comp" in optimizer_tensors(optimizer)) is compensated


SCHEDULE_FREE = [name for name, entry in CATALOGUE.items() if entry.is_schedule_free]


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_averaged_weights_lie_between_and_are_taken_back_exactly(name: str) -> None:
    tensors = parameters()
    rate = 1.0 if CATALOGUE[name].finds_rate else 1e-2
    optimizer = build_optimizer(name, tensors, learning_rate=rate, options={"d0": "0.01"} if name == "prodigy" else {})
    train(optimizer, tensors, range(12))
    before = copies(tensors)
    beta1 = optimizer.param_groups[0]["betas"][0]
    expected = [
        tensor.detach() + (1 - 1 / beta1) * (optimizer.state[tensor]["z"] - tensor.detach()) for tensor in tensors
    ]

    with averaged_weights(optimizer):
        averaged = copies(tensors)
    train_twice = copies(tensors)

    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(averaged, expected, strict=True))
    assert not are_equal(averaged, before)
    assert are_equal(train_twice, before)
    assert optimizer.param_groups[0]["train_mode"] is True


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_pictures_in_between_do_not_change_a_schedule_free_training(name: str) -> None:
    plain, drawn = parameters(), parameters()
    undisturbed = build_optimizer(name, plain, learning_rate=1e-2)
    disturbed = build_optimizer(name, drawn, learning_rate=1e-2)
    train(undisturbed, plain, range(6))
    for step in range(6):
        train(disturbed, drawn, range(step, step + 1))
        with averaged_weights(disturbed):
            pass

    assert are_equal(plain, drawn)


def test_averaged_weights_come_back_after_an_error() -> None:
    tensors = parameters()
    optimizer = build_optimizer("adamw_schedulefree", tensors, learning_rate=1e-2)
    train(optimizer, tensors, range(4))
    before = copies(tensors)

    with pytest.raises(RuntimeError, match="no room"), averaged_weights(optimizer):
        raise RuntimeError("no room for the picture")

    assert are_equal(tensors, before)


def test_the_state_is_named_and_detached_and_empty_before_a_step() -> None:
    tensors = parameters()
    optimizer = build_optimizer("adamw", tensors, learning_rate=1e-2)
    assert optimizer_tensors(optimizer) == {}
    load_optimizer_tensors(optimizer, {})
    train(optimizer, tensors, range(1))

    state = optimizer_tensors(optimizer)
    before = {key: tensor.clone() for key, tensor in state.items()}
    train(optimizer, tensors, range(1, 2))

    assert {key.split(".")[0] for key in state} == {"00000", "00001", "00002", "00003", "python"}
    assert "00000.exp_avg" in state
    assert all(torch.equal(state[key], before[key]) for key in state)


def saved_state(name: str = "adamw", shapes: Sequence[tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    tensors = parameters(shapes=shapes)
    optimizer = build_optimizer(name, tensors, learning_rate=1e-2)
    train(optimizer, tensors, range(1))
    return optimizer_tensors(optimizer)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (saved_state(shapes=[(4, 3)]), "of 1 parameters, the adapter has 4"),
        (saved_state(shapes=[(96, 96), (3, 4), (5,), ()]), r"state 00001 has shape \(3, 4\), its parameter \(4, 3\)"),
        (saved_state("optimi-lion"), "state is of Lion, the optimiser is AdamW"),
        ({"00000.exp_avg": torch.zeros(4, 3)}, "incomplete or of an older version"),
    ],
)
def test_refuses_the_state_of_something_else(state: dict[str, torch.Tensor], message: str) -> None:
    optimizer = build_optimizer("adamw", parameters(), learning_rate=1e-2)

    with pytest.raises(ValueError, match=message):
        load_optimizer_tensors(optimizer, state)

    assert optimizer_tensors(optimizer) == {}


def test_settings_of_a_resumed_optimiser_are_those_it_was_built_with() -> None:
    tensors = parameters()
    optimizer = build_optimizer("adamw", tensors, learning_rate=1e-2, weight_decay=0.5)

    load_optimizer_tensors(optimizer, saved_state())

    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_refuses_unknown_names_and_settings() -> None:
    with pytest.raises(UnknownOptimizerError, match=r"'sgd' is unknown; use one of adamw, torch-adamw, optimi-lion"):
        build_optimizer("sgd", parameters(), learning_rate=1e-2)
    with pytest.raises(OptimizerOptionError, match="no setting 'momentum'"):
        build_optimizer("adamw", parameters(), learning_rate=1e-2, options={"momentum": "0.9"})
    with pytest.raises(ValueError, match="muon has no beta1"):
        build_optimizer("muon", parameters(), learning_rate=1e-2, beta1=0.5)


def test_only_the_library_of_the_chosen_optimiser_is_imported() -> None:
    libraries = "('optimi', 'bitsandbytes', 'prodigyplus', 'schedulefree', 'pytorch_optimizer', 'torchao')"
    program = (
        "import sys, torch, reverie_hidream.optimizers as o;"
        "o.build_optimizer('adamw', [torch.nn.Parameter(torch.zeros(2))], learning_rate=1.0).step();"
        f"sys.exit(any(name in sys.modules for name in {libraries}))"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
