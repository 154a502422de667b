"""Tokens of an image, and the plan of every attention."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_hidream_image import HiDreamImageEmbedND, apply_rope
from reverie_hidream.pad_folding import TokenLayout, lay_out, pad_biases, patchify, plan_attention, rotate, unpatchify


def test_a_square_latent_has_no_padding_at_any_size() -> None:
    layout = lay_out(256, 256, patch_size=2, max_tokens=4096)

    assert (layout.num_real, layout.num_padding, layout.num_tokens) == (16384, 0, 16384)


def test_a_640x448_picture_costs_1121_tokens() -> None:
    layout = lay_out(448 // 8, 640 // 8, patch_size=2, max_tokens=4096)

    assert (layout.num_real, layout.num_padding, layout.num_tokens) == (1120, 2976, 1121)


def test_a_non_square_latent_that_fills_the_canvas_has_no_padding() -> None:
    layout = lay_out(64, 256, patch_size=2, max_tokens=4096)

    assert (layout.num_padding, layout.num_tokens) == (0, 4096)


def test_patches_are_put_back_where_they_were() -> None:
    layout = lay_out(4, 6, patch_size=2, max_tokens=16)
    latents = torch.randn(2, 3, 4, 6)

    tokens = patchify(latents, layout, 2)

    assert tokens.shape == (2, 7, 12)
    assert tokens[:, 6].eq(0).all()
    assert torch.equal(unpatchify(tokens, layout, 2), latents)


def test_channels_are_fastest_in_a_patch() -> None:
    layout = lay_out(2, 2, patch_size=2, max_tokens=16)
    latents = torch.arange(8.0).view(1, 2, 2, 2)

    assert patchify(latents, layout, 2)[0, 0].tolist() == [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]


def test_rotation_gives_the_bits_of_diffusers() -> None:
    embedder = HiDreamImageEmbedND(theta=10000, axes_dim=[8, 4, 4])
    layout = TokenLayout(num_rows=3, num_columns=5, num_padding=0, num_pad_tokens=0)
    ids = torch.zeros(1, 15 + 4, 3)
    ids[0, :15, 1], ids[0, :15, 2] = torch.arange(15) // 5, torch.arange(15) % 5
    query, key = torch.randn(2, 19, 2, 16), torch.randn(2, 19, 2, 16)

    plan = plan_attention(embedder, layout, 4, query)
    expected_query, expected_key = apply_rope(query, key, embedder(ids))

    assert torch.equal(rotate(query, plan.query_rotation), expected_query)
    assert torch.equal(rotate(key, plan.key_rotation), expected_key)


def test_features_beyond_the_rotations_stay() -> None:
    features = torch.randn(1, 2, 1, 8)

    rotated = rotate(features, torch.full((2, 1, 2), 1j, dtype=torch.complex64))

    assert torch.equal(rotated[..., 4:], features[..., 4:])
    assert torch.equal(rotated[..., 0], -features[..., 1])


def test_the_pad_token_weighs_as_all_that_it_stands_for() -> None:
    embedder = HiDreamImageEmbedND(theta=10000, axes_dim=[8, 4, 4])
    layout = TokenLayout(num_rows=1, num_columns=2, num_padding=10, num_pad_tokens=1)

    plan = plan_attention(embedder, layout, 1, torch.zeros(1, dtype=torch.bfloat16))

    assert plan.bias is not None
    assert plan.bias.dtype == torch.float32
    assert plan.bias.flatten().tolist() == pytest.approx([0.0, 0.0, math.log(10), 0.0])
    assert plan.key_rotation.abs().amin(dim=(1, 2)).tolist() == pytest.approx([1.0, 1.0, 0.0, 1.0])
    assert plan.query_rotation.abs().amin(dim=(1, 2)).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(("width", "num_pad_tokens"), [(4, 2), (12, 6), (14, 3), (16, 8), (128, 8)])
def test_pad_tokens_fill_up_to_the_alignment(width: int, num_pad_tokens: int) -> None:
    layout = lay_out(6, width, patch_size=2, max_tokens=4096, alignment=8)

    assert layout.num_pad_tokens == num_pad_tokens
    assert layout.num_tokens % 8 == 0


@pytest.mark.parametrize("num_padding", [1, 40, 2976, 4095])
@pytest.mark.parametrize(
    ("dtype", "num_pad_tokens", "tolerance"),
    [
        (torch.float64, 1, 1e-14),
        (torch.float64, 8, 1e-9),
        (torch.float32, 1, 1e-6),
        (torch.bfloat16, 1, 4e-2),
        (torch.bfloat16, 2, 4e-3),
        (torch.bfloat16, 8, 1e-6),
        (torch.float16, 8, 1e-6),
    ],
)
def test_the_weights_of_the_pad_tokens_add_up(
    num_padding: int, dtype: torch.dtype, num_pad_tokens: int, tolerance: float
) -> None:
    biases = pad_biases(num_padding, num_pad_tokens, dtype)

    assert biases.dtype == dtype
    assert biases.double().exp().sum().item() == pytest.approx(num_padding, rel=tolerance)
