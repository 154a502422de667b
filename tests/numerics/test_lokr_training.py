"""One training loss with its adapter gradients, and the exported file, against diffusers and LyCORIS themselves.

The reference is the plain loop of a tutorial: diffusers' module in train() mode, whose output it brings back to an
image by the recipe of spec 1.6, and LyCORIS' own network building dense changes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from reverie_hidream.adapters import LokrConfig, LokrPreset, attach_lokr, load_adapter, merge_adapter
from reverie_hidream.flow import noisy_latents, timesteps_of, velocity_target
from reverie_hidream.quantise import quantise
from reverie_hidream.transformer import load_transformer, predict_velocity
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Load = Callable[[torch.dtype], Any]
MakeBatch = Callable[..., Any]
Error = Callable[[torch.Tensor, torch.Tensor], float]

EVERYWHERE = LokrPreset(target_module=("Attention", "FeedForward"))
FULL = LokrConfig(factor=4, use_scalar=True, apply_preset=EVERYWHERE)
FACTORISED = LokrConfig(factor=4, full_matrix=False, linear_dim=2, linear_alpha=0.5, apply_preset=EVERYWHERE)
BOTH = LokrConfig(
    factor=16,
    full_matrix=False,
    linear_dim=3,
    linear_alpha=1.5,
    decompose_both=True,
    multiplier=0.5,
    use_scalar=True,
    apply_preset=EVERYWHERE,
)
# A size of its own for the comparison in float64: rotations of a size are kept, and there they are kept in float64.
CASES = [
    pytest.param(FULL, (16, 16), torch.float32, 1e-5, id="full-square-float32"),
    pytest.param(FULL, (12, 20), torch.float32, 1e-5, id="full-float32"),
    pytest.param(FULL, (18, 18), torch.float64, 1e-10, id="full-square-float64"),
    pytest.param(FULL, (12, 28), torch.float64, 1e-10, id="full-float64"),
    pytest.param(FACTORISED, (12, 28), torch.float64, 1e-10, id="factorised-float64"),
    pytest.param(BOTH, (12, 28), torch.float64, 1e-10, id="both-float64"),
]
CONFIGS = [pytest.param(FULL, id="full"), pytest.param(FACTORISED, id="factorised"), pytest.param(BOTH, id="both")]


@pytest.fixture(autouse=True)
def _lycoris_classes() -> Iterator[None]:
    """LyCORIS keeps its selection in class attributes; the reference here sets them, and puts them back."""
    saved = list(LycorisNetwork.TARGET_REPLACE_MODULE)
    yield
    LycorisNetwork.apply_preset({"target_module": saved})


def reference_network(transformer: Any, config: LokrConfig, dtype: torch.dtype) -> LycorisNetwork:
    LycorisNetwork.apply_preset({"target_module": ["HiDreamAttention", "HiDreamImageFeedForwardSwiGLU"]})
    network = LycorisNetwork(
        transformer,
        multiplier=config.multiplier,
        lora_dim=config.linear_dim,
        alpha=config.linear_alpha,
        network_module="lokr",
        factor=config.factor,
        full_matrix=config.full_matrix,
        use_scalar=config.use_scalar,
        decompose_both=config.decompose_both,
        bypass_mode=False,
    )
    network.apply_to()
    return network.to(dtype)


def reference_loss(transformer: Any, batch: Any, dtype: torch.dtype) -> torch.Tensor:
    sigmas = batch.sigmas.view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * batch.latents + sigmas * batch.noise
    output = transformer.train()(
        noisy.to(dtype), batch.sigmas * 1000, batch.text.t5, batch.text.llama, batch.text.pooled, return_dict=False
    )[0]
    batch_size, channels, rows, columns = batch.latents.shape[0], 16, *(side // 2 for side in batch.latents.shape[-2:])
    patches = output[:, :, : rows * columns].reshape(batch_size, channels, rows, columns, 2, 2)
    velocity = -patches.permute(0, 1, 2, 4, 3, 5).reshape(batch.latents.shape)
    return torch.nn.functional.mse_loss(velocity, batch.noise - batch.latents)


def own_loss(transformer: Any, batch: Any) -> torch.Tensor:
    noisy = noisy_latents(batch.latents, batch.noise, batch.sigmas)
    velocity = predict_velocity(transformer, noisy, timesteps_of(batch.sigmas), batch.text)
    return functional.mse_loss(velocity, velocity_target(batch.latents, batch.noise))


def trained_state(adapter: Any) -> dict[str, torch.Tensor]:
    """A state as training could leave it: no factor is zero."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.tensor(0.7, dtype=tensor.dtype)
        if name.endswith("scalar")
        else (0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)).to(tensor.dtype)
        for name, tensor in adapter.raw_state().items()
    }


class KeepFloat64(TorchFunctionMode):
    """Leaves float64 tensors as they are where the code under comparison asks for float32.

    The rotary embedding is computed in float32 by definition (spec 1.5). In the backward pass that rounds the gradient
    of each pad token in the reference, and that of their sum in ours: equal to 1e-8, which would hide other errors.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("config", "size", "dtype", "tolerance"), CASES)
def test_loss_and_gradients_equal_the_plain_loop(
    config: LokrConfig,
    size: tuple[int, int],
    dtype: torch.dtype,
    tolerance: float,
    tiny_checkpoint: Path,
    load_reference: Load,
    make_batch: MakeBatch,
    relative_error: Error,
) -> None:
    batch = make_batch(*size, batch_size=2 if config is FULL else 1, dtype=dtype)
    transformer = load_transformer(tiny_checkpoint, dtype=dtype)
    adapter = attach_lokr(transformer, config, dtype=dtype)
    state = trained_state(adapter)
    adapter.load_raw_state(state)
    reference = load_reference(dtype).requires_grad_(False)
    network = reference_network(reference, config, dtype)
    theirs = dict(network.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            theirs[name].copy_(tensor)

    with KeepFloat64():
        loss, expected_loss = own_loss(transformer, batch), reference_loss(reference, batch, dtype)
        loss.backward()
        expected_loss.backward()

    assert theirs.keys() == adapter.named_parameters().keys()
    assert abs(loss.item() - expected_loss.item()) < tolerance * abs(expected_loss.item())
    gradients = torch.cat([_gradient(tensor) for tensor in adapter.parameters()])
    expected = torch.cat([_gradient(theirs[name]) for name in adapter.named_parameters()])
    assert relative_error(gradients, expected) < tolerance
    assert all(_gradient(tensor).abs().sum() > 0 for tensor in adapter.parameters())


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad.flatten()


@pytest.mark.parametrize("config", CONFIGS)
def test_the_exported_file_gives_the_trained_output_in_lycoris(
    config: LokrConfig,
    tmp_path: Path,
    tiny_checkpoint: Path,
    load_reference: Load,
    make_batch: MakeBatch,
    relative_error: Error,
) -> None:
    batch = make_batch(12, 20, batch_size=1)
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float64)
    adapter = attach_lokr(transformer, config, dtype=torch.float64)
    # Numbers that float32 holds exactly: the file's dtype then costs nothing. The scalar is a power of two for the same
    # reason.
    state = {name: tensor.float().double() for name, tensor in trained_state(adapter).items()}
    adapter.load_raw_state({name: _half_if_scalar(name, tensor) for name, tensor in state.items()})
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(adapter.export(dtype=torch.float32))
    with torch.no_grad():
        trained = predict_velocity(transformer, batch.noise, timesteps_of(batch.sigmas), batch.text)

    fresh = load_reference(torch.float64).eval()
    network, _ = create_lycoris_from_weights(config.multiplier, str(file), fresh)
    network.apply_to()
    network.to(torch.float64)
    with torch.no_grad():
        loaded = -fresh(
            batch.noise,
            timesteps_of(batch.sigmas),
            batch.text.t5,
            batch.text.llama,
            batch.text.pooled,
            return_dict=False,
        )[0]

    assert relative_error(loaded, trained) < 1e-10


def _half_if_scalar(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, 0.5) if name.endswith("scalar") else tensor


@pytest.mark.parametrize("config", CONFIGS)
def test_merged_equals_applied_equals_trained(
    config: LokrConfig, tiny_checkpoint: Path, make_batch: MakeBatch, relative_error: Error
) -> None:
    batch, strength = make_batch(12, 20, batch_size=1), 0.6
    timesteps = timesteps_of(batch.sigmas)
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float64)
    base = predict_velocity(transformer, batch.noise, timesteps, batch.text)
    adapter = attach_lokr(transformer, config, dtype=torch.float64)
    adapter.load_raw_state(trained_state(adapter))
    adapter.set_strength(strength)
    trained = predict_velocity(transformer, batch.noise, timesteps, batch.text).detach()
    body = adapter.export(dtype=torch.float64)
    adapter.detach()

    loaded = load_adapter(transformer, body, strength=strength)
    applied = predict_velocity(transformer, batch.noise, timesteps, batch.text)
    loaded.detach()
    num_merged = merge_adapter(transformer, body, strength=strength)
    merged = predict_velocity(transformer, batch.noise, timesteps, batch.text)

    assert num_merged == adapter.num_modules
    assert relative_error(applied, trained) < 1e-12
    assert relative_error(merged, trained) < 1e-12
    assert relative_error(trained, base) > 1e-2


def test_the_adapter_means_the_same_on_a_quantised_base(
    tiny_checkpoint: Path, make_batch: MakeBatch, relative_error: Error
) -> None:
    """A file trained on a plain base gives an int8 one the same change, up to the base's own rounding (spec 4.5)."""
    batch = make_batch(16, 16, dtype=torch.float32)
    timesteps = timesteps_of(batch.sigmas)
    plain = load_transformer(tiny_checkpoint, dtype=torch.float32)
    adapter = attach_lokr(plain, FULL)
    adapter.load_raw_state(trained_state(adapter))
    body = adapter.export(dtype=torch.float32)
    expected = predict_velocity(plain, batch.noise, timesteps, batch.text).detach()

    quantised = load_transformer(tiny_checkpoint, dtype=torch.float32, precision="int8-quanto")
    base = predict_velocity(quantised, batch.noise, timesteps, batch.text)
    load_adapter(quantised, body)
    found = predict_velocity(quantised, batch.noise, timesteps, batch.text)
    merge_then_quantise = load_transformer(tiny_checkpoint, dtype=torch.float32)
    merge_adapter(merge_then_quantise, body)
    quantise(merge_then_quantise, "int8-quanto")
    merged = predict_velocity(merge_then_quantise, batch.noise, timesteps, batch.text)

    assert relative_error(found, expected) < 0.05
    assert relative_error(merged, expected) < 0.05
    assert relative_error(base, expected) > 0.2


def test_adapter_gradients_on_a_quantised_base_follow_those_on_the_plain_one(
    tiny_checkpoint: Path, make_batch: MakeBatch
) -> None:
    batch = make_batch(12, 20, dtype=torch.float32)
    gradients = []
    for precision in ("no_change", "int8-quanto"):
        transformer = load_transformer(tiny_checkpoint, dtype=torch.float32, precision=precision)
        adapter = attach_lokr(transformer, FULL)
        adapter.load_raw_state(trained_state(adapter))
        own_loss(transformer, batch).backward()
        gradients.append(torch.cat([_gradient(tensor) for tensor in adapter.parameters()]))

    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.98
