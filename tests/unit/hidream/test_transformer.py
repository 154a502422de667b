"""Loading the transformer and the velocity that it predicts."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.transformer import (
    build_meta_transformer,
    canvas_pixels,
    check_image_size,
    enable_gradient_checkpointing,
    load_transformer,
    pixel_multiple,
    predict_velocity,
    prepare_transformer,
)
from safetensors.torch import load_file

MakeTransformer = Callable[..., HiDreamImageTransformer2DModel]
MakeConditioning = Callable[..., TextConditioning]


def noisy(batch_size: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, 4, height, width, generator=generator, dtype=torch.float64).to(dtype)


def test_loads_frozen_with_the_checkpoint_s_names(tiny_checkpoint: Path) -> None:
    transformer = load_transformer(tiny_checkpoint, dtype=torch.bfloat16)

    stored = load_file(tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    assert transformer.state_dict().keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in transformer.state_dict().items())
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_loads_quantised_and_frozen(tiny_checkpoint: Path) -> None:
    transformer = load_transformer(tiny_checkpoint, dtype=torch.float32, precision="int8-quanto")

    kinds = {type(module).__name__ for module in transformer.modules()}
    assert "QLinear" in kinds
    assert "Linear" not in kinds
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_refuses_an_unknown_precision(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="int7"):
        load_transformer(tiny_checkpoint, precision="int7")


def test_a_missing_transformer_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="transformer"):
        load_transformer(tmp_path)


def test_refuses_a_model_whose_experts_would_get_no_gradient() -> None:
    with torch.device("meta"):
        model = HiDreamImageTransformer2DModel(
            **{**small_config(), "force_inference_output": True}  # what diffusers' own example does
        )

    with pytest.raises(ValueError, match="force_inference_output=False"):
        prepare_transformer(model)


def small_config() -> dict[str, object]:
    return {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 0,
        "attention_head_dim": 8,
        "num_attention_heads": 1,
        "caption_channels": [8, 8],
        "text_emb_dim": 8,
        "axes_dims_rope": [4, 2, 2],
        "max_resolution": [4, 4],
        "llama_layers": [0],
    }


def test_diffusers_own_forward_gives_images_with_gradients_to_all_experts(
    make_transformer: MakeTransformer, make_conditioning: MakeConditioning
) -> None:
    transformer = make_transformer().requires_grad_(True)
    text = make_conditioning()

    output = transformer(noisy(1, 8, 8), torch.tensor([500.0]), text.t5, text.llama, text.pooled, return_dict=False)[0]
    output.square().sum().backward()

    assert output.shape == (1, 4, 8, 8)
    experts = [parameter for name, parameter in transformer.named_parameters() if ".experts." in name]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in experts)


@pytest.mark.parametrize("size", [(8, 8), (4, 10), (8, 16), (20, 20)])
def test_predicts_an_image_of_the_same_size(
    make_transformer: MakeTransformer, make_conditioning: MakeConditioning, size: tuple[int, int]
) -> None:
    velocity = predict_velocity(
        make_transformer(torch.bfloat16),
        noisy(2, *size, dtype=torch.float32),
        torch.tensor([1.0, 999.0]),
        make_conditioning(2, torch.float32),
    )

    assert velocity.shape == (2, 4, *size)
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()


@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
def test_a_sample_does_not_depend_on_the_others_in_its_batch(
    make_transformer: MakeTransformer, make_conditioning: MakeConditioning, size: tuple[int, int]
) -> None:
    transformer, text = make_transformer(), make_conditioning(2)
    latents, timesteps = noisy(2, *size), torch.tensor([100.0, 900.0])
    second = TextConditioning(t5=text.t5[1:], llama=text.llama[:, 1:], pooled=text.pooled[1:])

    both = predict_velocity(transformer, latents, timesteps, text)
    alone = predict_velocity(transformer, latents[1:], timesteps[1:], second)

    # RoPE is float32 in every model: split over threads, its vector and scalar paths differ by an ulp (2e-11 seen).
    assert torch.allclose(both[1:], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
def test_gradient_checkpointing_changes_no_gradient(
    make_transformer: MakeTransformer, make_conditioning: MakeConditioning, size: tuple[int, int]
) -> None:
    transformer = make_transformer().requires_grad_(True)
    found = []
    for enabled in (False, True):
        enable_gradient_checkpointing(transformer, enabled)
        velocity = predict_velocity(transformer, noisy(1, *size), torch.tensor([300.0]), make_conditioning())
        found.append(torch.autograd.grad(velocity.square().sum(), list(transformer.parameters())))

    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*found, strict=True))


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(
    make_transformer: MakeTransformer, make_conditioning: MakeConditioning
) -> None:
    transformer = make_transformer(torch.float32).requires_grad_(True)
    saved: list[int] = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.nbytes)
        return tensor

    kept_bytes = {}
    for enabled in (False, True):
        enable_gradient_checkpointing(transformer, enabled)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            predict_velocity(transformer, noisy(1, 8, 8), torch.tensor([300.0]), make_conditioning(dtype=torch.float32))
        kept_bytes[enabled] = sum(saved)

    assert kept_bytes[True] < 0.5 * kept_bytes[False]


def test_refuses_a_batch_that_does_not_fit_its_prompts(
    make_transformer: MakeTransformer, make_conditioning: MakeConditioning
) -> None:
    with pytest.raises(ValueError, match="2 latents need as many timesteps and prompts"):
        predict_velocity(make_transformer(), noisy(2, 8, 8), torch.zeros(2), make_conditioning(1))


def test_refuses_a_non_square_latent_over_the_canvas(
    make_transformer: MakeTransformer, make_conditioning: MakeConditioning
) -> None:
    with pytest.raises(ValueError, match="has 40 patches, the canvas holds 32"):
        predict_velocity(make_transformer(), noisy(1, 8, 20), torch.zeros(1), make_conditioning())


def test_refuses_a_latent_that_cuts_a_patch(
    make_transformer: MakeTransformer, make_conditioning: MakeConditioning
) -> None:
    with pytest.raises(ValueError, match="not a positive multiple of 2"):
        predict_velocity(make_transformer(), noisy(1, 7, 8), torch.zeros(1), make_conditioning())


def test_the_released_model_draws_a_megapixel_in_steps_of_16() -> None:
    transformer = build_meta_transformer()

    assert canvas_pixels(transformer) == 1024 * 1024
    assert pixel_multiple(transformer) == 16
    check_image_size(transformer, width=1360, height=768)
    check_image_size(transformer, width=2048, height=2048)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [(0, 64, "multiples of 16"), (64, 72, "multiples of 16"), (2048, 1024, "may have 1048576")],
)
def test_refuses_sizes_that_the_released_model_cannot_draw(width: int, height: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_image_size(build_meta_transformer(), width=width, height=height)


def test_the_real_configuration_names_every_setting_of_the_class() -> None:
    from reverie_hidream.transformer import REAL_CONFIG

    parameters = inspect.signature(HiDreamImageTransformer2DModel.__init__).parameters
    assert set(REAL_CONFIG) == set(parameters) - {"self", "force_inference_output"}
