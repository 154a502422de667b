"""Our forward pass against diffusers' own, padded one, on the tiny checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reverie_hidream.flow import noisy_latents, timesteps_of
from reverie_hidream.pad_folding import lay_out, patchify, unpatchify
from reverie_hidream.transformer import _predict_tokens, load_transformer, predict_velocity

Load = Callable[[torch.dtype], Any]
MakeBatch = Callable[..., Any]
Error = Callable[[torch.Tensor, torch.Tensor], float]

# Square; non-square with much, little and no padding (the tiny canvas has 256 tokens); square above the canvas.
SIZES = [(16, 16), (4, 6), (12, 20), (40, 24), (16, 64), (36, 36)]


@torch.no_grad()
def diffusers_velocity(reference: Any, latents: torch.Tensor, timesteps: torch.Tensor, text: Any) -> torch.Tensor:
    output: torch.Tensor = reference.eval()(latents, timesteps, text.t5, text.llama, text.pooled, return_dict=False)[0]
    return -output


@pytest.mark.parametrize("size", SIZES)
def test_float64_equals_diffusers_padded_forward(
    size: tuple[int, int],
    tiny_checkpoint: Path,
    load_reference: Load,
    make_batch: MakeBatch,
    relative_error: Error,
) -> None:
    batch = make_batch(*size)
    latents = noisy_latents(batch.latents, batch.noise, batch.sigmas)
    timesteps = timesteps_of(batch.sigmas)
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float64)

    found = predict_velocity(transformer, latents, timesteps, batch.text)

    expected = diffusers_velocity(load_reference(torch.float64), latents, timesteps, batch.text)
    assert found.dtype == torch.float64
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrower_dtypes_equal_diffusers_within_their_rounding(
    size: tuple[int, int],
    dtype: torch.dtype,
    tolerance: float,
    tiny_checkpoint: Path,
    load_reference: Load,
    make_batch: MakeBatch,
    relative_error: Error,
) -> None:
    batch = make_batch(*size, dtype=dtype)
    timesteps = timesteps_of(batch.sigmas.float())
    transformer = load_transformer(tiny_checkpoint, dtype=dtype)

    found = predict_velocity(transformer, batch.noise, timesteps, batch.text)

    expected = diffusers_velocity(load_reference(dtype), batch.noise, timesteps, batch.text)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < tolerance


@torch.no_grad()
def test_several_pad_tokens_that_share_the_weight_are_the_same_function(
    tiny_checkpoint: Path, make_batch: MakeBatch, relative_error: Error
) -> None:
    """As on devices whose attention wants an aligned number of tokens; this machine's does not."""
    batch = make_batch(12, 20)
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float64)
    velocities = []
    for alignment, num_pad_tokens in ((1, 1), (8, 4)):
        layout = lay_out(12, 20, patch_size=2, max_tokens=transformer.max_seq, alignment=alignment)
        assert layout.num_pad_tokens == num_pad_tokens
        tokens = patchify(batch.noise, layout, 2)
        output = _predict_tokens(transformer, tokens, timesteps_of(batch.sigmas), batch.text, layout)
        velocities.append(-unpatchify(output, layout, 2))

    assert torch.equal(
        velocities[0], predict_velocity(transformer, batch.noise, timesteps_of(batch.sigmas), batch.text)
    )
    assert relative_error(velocities[1], velocities[0]) < 1e-12


def test_the_padding_matters(
    tiny_checkpoint: Path, load_reference: Load, make_batch: MakeBatch, relative_error: Error
) -> None:
    """Dropping the padding, as a fast path that passes unpadded tokens would, is another function."""
    batch = make_batch(12, 20)
    reference = load_reference(torch.float64).eval()
    tokens = batch.noise.reshape(2, 16, 6, 2, 10, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 60, 64)
    ids = torch.zeros(2, 60, 3)
    ids[..., 1], ids[..., 2] = torch.arange(60) // 10, torch.arange(60) % 10
    with torch.no_grad():
        unpadded = -reference(
            tokens,
            batch.sigmas,
            batch.text.t5,
            batch.text.llama,
            batch.text.pooled,
            img_ids=ids,
            img_sizes=[(6, 10), (6, 10)],
            hidden_states_masks=torch.ones(2, 60, dtype=torch.float64),
            return_dict=False,
        )[0]
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float64)

    found = predict_velocity(transformer, batch.noise, batch.sigmas, batch.text)

    assert relative_error(found, unpadded) > 1e-3
