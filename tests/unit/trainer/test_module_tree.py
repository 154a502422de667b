"""The control plane's picture of the transformer, against diffusers and LyCORIS themselves."""

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from lycoris.functional.general import factorization as lycoris_factorization
from reverie_common.lycoris_presets import factorization
from reverie_trainer.jobs.admission.adapter_selection import (
    TransformerConfig,
    enumerate_modules,
    num_transformer_parameters,
)

CONFIG: dict[str, object] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "caption_channels": [48, 80],
    "text_emb_dim": 112,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [8, 4, 4],
    "max_resolution": [32, 32],
    "llama_layers": [0, 1, 2, 2, 2],
}


@pytest.fixture(scope="module")
def model() -> HiDreamImageTransformer2DModel:
    with torch.device("meta"):
        return HiDreamImageTransformer2DModel(**CONFIG)


def test_every_linear_has_the_name_the_shape_and_the_bias_of_diffusers(model: HiDreamImageTransformer2DModel) -> None:
    theirs = {
        name: (module.out_features, module.in_features, module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    ours = {
        module.name: (*module.shape, module.has_bias)
        for module in enumerate_modules(TransformerConfig.from_json(CONFIG))
        if module.shape is not None
    }
    assert ours == theirs


def test_every_module_has_the_class_of_diffusers(model: HiDreamImageTransformer2DModel) -> None:
    theirs = {name: type(module).__name__ for name, module in model.named_modules()}
    ours = {module.name: module.class_name for module in enumerate_modules(TransformerConfig.from_json(CONFIG))}
    assert ours.items() <= theirs.items()


def test_modules_come_in_the_order_of_diffusers(model: HiDreamImageTransformer2DModel) -> None:
    ours = [module.name for module in enumerate_modules(TransformerConfig.from_json(CONFIG))]
    known = set(ours)
    assert ours == [name for name, _ in model.named_modules() if name in known]


def test_parameters_are_as_many_as_in_diffusers(model: HiDreamImageTransformer2DModel) -> None:
    theirs = sum(parameter.numel() for parameter in model.parameters())
    assert num_transformer_parameters(TransformerConfig.from_json(CONFIG)) == theirs


def test_factorization_equals_that_of_lycoris() -> None:
    pairs = [(dimension, factor) for dimension in range(1, 400) for factor in (-1, 1, 2, 4, 8, 16, 25)]
    assert [factorization(*pair) for pair in pairs] == [lycoris_factorization(*pair) for pair in pairs]
