"""The numbers of spec 12.2 on the full-size configuration, without memory for its weights."""

import json
from typing import Any

import pytest
from optimum.quanto import QLinear, qint8, quantize
from reverie_hidream.adapters import LokrConfig, count_selected
from reverie_hidream.adapters.lokr import count_modules
from reverie_hidream.transformer import build_meta_transformer
from torch import nn

HEAD = """
    "algo": "lokr", "multiplier": 1.0, "linear_dim": 16384, "linear_alpha": 1, "full_matrix": true, "factor": 16
"""
ATTENTION = f"""{{{HEAD}, "use_scalar": true, "apply_preset": {{
    "target_module": ["Attention"], "module_algo_map": {{"Attention": {{"factor": 16}}}}
}}}}"""
ATTENTION_AND_FEED_FORWARD = f"""{{{HEAD}, "use_scalar": true, "apply_preset": {{
    "target_module": ["Attention", "FeedForward"],
    "module_algo_map": {{"Attention": {{"factor": 16}}, "FeedForward": {{"factor": 16}}}}
}}}}"""
NAMES = f"""{{{HEAD}, "use_scalar": true, "apply_preset": {{
    "name_algo_map": {{
        "double_stream_blocks.*.block.attn*": {{"factor": 16}},
        "double_stream_blocks.*.block.ff_t*": {{"factor": 16}},
        "double_stream_blocks.*.block.ff_i.shared_experts*": {{"factor": 16}},
        "single_stream_blocks.*.block.attn*": {{"factor": 16}},
        "single_stream_blocks.*.block.ff_i.shared_experts*": {{"factor": 16}}
    }},
    "use_fnmatch": true
}}}}"""
SELECTIONS = [
    pytest.param(ATTENTION, 256, 6_619_136, id="attention"),
    pytest.param(ATTENTION_AND_FEED_FORWARD, 1024, 55_107_584, id="attention-and-feed-forward"),
    pytest.param(NAMES, 448, 15_147_008, id="names"),
]


def test_the_released_model_has_its_size() -> None:
    transformer = build_meta_transformer()

    assert sum(parameter.numel() for parameter in transformer.parameters()) == 17_105_733_184
    assert sum(isinstance(module, nn.Linear) for module in transformer.modules()) == 1128
    assert len(transformer.state_dict()) == 1615


@pytest.mark.parametrize(("text", "num_modules", "num_parameters"), SELECTIONS)
def test_a_selection_has_its_size_on_the_plain_base(text: str, num_modules: int, num_parameters: int) -> None:
    config: dict[str, Any] = json.loads(text)

    with_scalar = count_selected(LokrConfig.from_dict(config))
    without = count_selected(LokrConfig.from_dict({**config, "use_scalar": False}))

    assert with_scalar == (num_modules, num_parameters + num_modules)
    assert without == (num_modules, num_parameters)


@pytest.mark.parametrize(("text", "num_modules", "num_parameters"), SELECTIONS)
def test_a_selection_has_the_same_size_on_the_quantised_base(text: str, num_modules: int, num_parameters: int) -> None:
    transformer = build_meta_transformer()
    quantize(transformer, weights=qint8)
    assert sum(isinstance(module, QLinear) for module in transformer.modules()) == 1128

    counted = count_modules(transformer, LokrConfig.from_dict(json.loads(text)))

    assert counted == (num_modules, num_parameters + num_modules)
