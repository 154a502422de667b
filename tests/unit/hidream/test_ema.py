"""The running average against a plain float64 loop."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from reverie_hidream.ema import Ema, EmaSettings, ema_decay_at
from reverie_hidream.optimizers import UpdateSettings, build_update
from torch import nn

SHAPES = {"w1": (6, 5), "scalar": ()}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def weights_at(step: int, name: str) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(100 * step + len(name)))


def follow(ema: Ema, tensors: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, tensor in tensors.items():
            tensor.data.copy_(weights_at(step, name))
        ema.update(step)


def expected(name: str, num_steps: int, settings: EmaSettings, dtype: torch.dtype) -> npt.NDArray[np.float64]:
    average = parameters(dtype)[name].detach().double().numpy()
    for step in range(1, num_steps + 1):
        if step % settings.update_interval:
            continue
        if settings.warmup_steps:
            decay = 0.0 if step < settings.warmup_steps else settings.decay
        else:
            decay = 0.0 if step == 1 else min(settings.decay, step / (9 + step))
        average = decay * average + (1 - decay) * weights_at(step, name).to(dtype).double().numpy()
    return average


@pytest.mark.parametrize(
    "settings",
    [
        EmaSettings(),
        EmaSettings(decay=0.5),
        EmaSettings(decay=0.0),
        EmaSettings(decay=0.9, update_interval=7),
        EmaSettings(decay=0.9, warmup_steps=20),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_steps_are_those_of_a_float64_loop(settings: EmaSettings, dtype: torch.dtype) -> None:
    tensors = parameters(dtype)
    ema = Ema(tensors, settings)
    follow(ema, tensors, range(1, 51))

    for name, shadow in ema.state().items():
        assert shadow.dtype == torch.float32
        assert np.abs(shadow.double().numpy() - expected(name, 50, settings, dtype)).max() < 1e-6


def test_a_resumed_average_is_the_uninterrupted_one_to_the_last_bit() -> None:
    settings = EmaSettings(decay=0.9, update_interval=3)
    tensors = parameters()
    ema = Ema(tensors, settings)
    follow(ema, tensors, range(1, 24))
    state = ema.state()
    follow(ema, tensors, range(24, 51))

    resumed = Ema(others := parameters(), settings)
    resumed.load_state(state)
    follow(resumed, others, range(24, 51))

    assert all(torch.equal(one, ema.state()[name]) for name, one in resumed.state().items())


def test_the_decay_rises_to_its_limit() -> None:
    found = [ema_decay_at(step, EmaSettings()) for step in (1, 2, 3, 11, 1790, 1792, 5000)]

    assert found == pytest.approx([0.0, 2 / 11, 3 / 12, 11 / 20, 1790 / 1799, 0.995, 0.995])
    assert [ema_decay_at(step, EmaSettings(warmup_steps=3)) for step in (1, 2, 3, 4)] == [0.0, 0.0, 0.995, 0.995]


def test_small_movements_are_not_lost() -> None:
    # In bfloat16 a shadow of 1 would not see a two-hundredth of 0.01, which is a fortieth of its last digit.
    tensor = nn.Parameter(torch.ones(4))
    ema = Ema({"w": tensor}, EmaSettings(warmup_steps=1))
    tensor.data.fill_(1.01)
    for step in range(1, 1001):
        ema.update(step)

    assert ema.state()["w"].tolist() == pytest.approx([1.01 - 0.01 * 0.995**1000] * 4, abs=1e-5)


def test_swapped_holds_the_average_and_gives_the_parameters_back() -> None:
    tensors = parameters()
    ema = Ema(tensors, EmaSettings())
    follow(ema, tensors, range(1, 9))
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    with ema.swapped():
        assert all(torch.equal(tensor, ema.state()[name]) for name, tensor in tensors.items())

    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_parameters_come_back_after_an_error() -> None:
    tensors = parameters()
    ema = Ema(tensors, EmaSettings())
    follow(ema, tensors, range(1, 9))
    before = tensors["w1"].detach().clone()

    with pytest.raises(RuntimeError, match="the picture failed"), ema.swapped():
        raise RuntimeError("the picture failed")

    assert torch.equal(tensors["w1"], before)


def test_training_while_swapped_out_never_reaches_the_shadows() -> None:
    tensors = parameters()
    ema = Ema(tensors, EmaSettings())
    state = ema.state()
    for tensor in tensors.values():
        tensor.data.add_(1.0)

    assert all(torch.equal(shadow, state[name]) for name, shadow in ema.state().items())
    ema.restart()
    assert all(torch.equal(shadow, tensors[name]) for name, shadow in ema.state().items())


def test_follows_the_averaged_weights_of_a_schedule_free_optimiser() -> None:
    tensors = parameters()
    update = build_update(list(tensors.values()), UpdateSettings(optimizer="adamw_schedulefree", learning_rate=0.1))
    ema = Ema(tensors, EmaSettings(decay=0.0))
    for step in range(1, 6):
        for name, tensor in tensors.items():
            tensor.grad = weights_at(step, name)
        update.begin(0.1)
        update.finish(torch.tensor(1.0))
        with update.averaged():
            ema.update(step)

    with update.averaged():
        assert all(torch.equal(shadow, tensors[name]) for name, shadow in ema.state().items())
    assert not torch.equal(ema.state()["w1"], tensors["w1"])


def test_refuses_the_average_of_another_adapter() -> None:
    ema = Ema(parameters(), EmaSettings())
    before = ema.state()

    with pytest.raises(ValueError, match="1 names differ, scalar first"):
        ema.load_state({"w1": torch.zeros(6, 5)})
    with pytest.raises(ValueError, match=r"w1 has shape \(5, 6\), not \(6, 5\)"):
        ema.load_state({"w1": torch.zeros(5, 6), "scalar": torch.zeros(())})

    assert torch.equal(ema.state()["w1"], before["w1"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"decay": 1.0}, "decay 1.0"), ({"update_interval": 0}, "interval 0"), ({"warmup_steps": -1}, "-1 steps")],
)
def test_refuses_what_is_no_average(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmaSettings(**settings)  # type: ignore[arg-type]  # that is what is tested
