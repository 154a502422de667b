"""What the control plane counts without torch, against the worker's real tensors on the meta device."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reverie_common.lycoris_presets import butterfly_factorization
from reverie_hidream.adapters import LokrConfig, LoraConfig, LycorisConfig, attach_adapter
from reverie_hidream.adapters.config import AdapterConfig
from reverie_hidream.adapters.lokr import count_modules
from reverie_hidream.transformer import REAL_CONFIG, build_meta_transformer
from reverie_trainer.jobs.admission.adapter_selection import TransformerConfig, select_adapter
from reverie_trainer.jobs.spec import (
    Adapter,
    FullRank,
    LokrAdapter,
    LokrOverrides,
    LokrPreset,
    LoraAdapter,
    LycorisAdapter,
)
from reverie_trainer.worker.adapter_file import adapter_config

RELEASED = TransformerConfig.from_json(dict(REAL_CONFIG))
# The released widths in fewer blocks, which is as good and quick.
SHORT_CONFIG = {**REAL_CONFIG, "num_layers": 4, "num_single_layers": 3, "llama_layers": [*range(7)]}
SHORT = TransformerConfig.from_json(SHORT_CONFIG)
NAMED = LokrPreset(
    name_algo_map={
        "double_stream_blocks.*.block.attn*": LokrOverrides(),
        "double_stream_blocks.*.block.ff_t*": LokrOverrides(linear_dim=4),
        "single_stream_blocks.*.block.ff_i.shared_experts*": LokrOverrides(factor=8),
    },
    target_name=("final_layer.linear", "caption_projection.*"),
    exclude_name=("*.to_out", "double_stream_blocks.3.*"),
)
NESTED = LokrPreset(
    target_module=("MOEFeedForward",),
    module_algo_map={"FeedForward": LokrOverrides(factor=8, linear_dim=2), "Attention": LokrOverrides(use_scalar=True)},
    use_fnmatch=False,
    exclude_name=(r"double_stream_blocks\.\d\.",),
)
RANKS = replace(NESTED, module_algo_map={"FeedForward": LokrOverrides(linear_dim=5)})
PLAIN = replace(NAMED, name_algo_map={name: LokrOverrides() for name in NAMED.name_algo_map})
ATTENTION = LokrPreset(target_module=("Attention",))


def lycoris(algo: str, preset: LokrPreset = ATTENTION, **settings: Any) -> LycorisAdapter:
    return LycorisAdapter(**{"algo": algo, "linear_dim": 10, "apply_preset": preset, **settings})


ADAPTERS: dict[str, Adapter] = {
    "lokr": LokrAdapter(use_scalar=True, apply_preset=NAMED),
    "lokr-split": LokrAdapter(full_matrix=False, linear_dim=6, decompose_both=True, apply_preset=NESTED),
    "lokr-dora": LokrAdapter(dora_wd=True, factor=25, apply_preset=NESTED),
    "locon": lycoris("locon", RANKS, use_scalar=True, dora_wd=True),
    "loha": lycoris("loha", PLAIN),
    "ia3": lycoris("ia3", PLAIN),
    "ia3-input": lycoris("ia3", RANKS, options={"train_on_input": "true"}),
    "dylora": lycoris("dylora", options={"block_size": "5"}),
    "glora": lycoris("glora", RANKS, use_scalar=True),
    "full": lycoris("full", PLAIN),
    "diag-oft": lycoris("diag-oft", RANKS, options={"rescaled": "true", "constraint": "0.1"}),
    "boft": lycoris("boft", options={"rescaled": "1"}),
    "lokr-by-lycoris": lycoris("lokr", options={"factor": "8", "full_matrix": "true"}),
    "mixture": lycoris(
        "loha",
        LokrPreset(
            module_algo_map={"Attention": LokrOverrides(algo="ia3"), "FeedForward": LokrOverrides(algo="locon")}
        ),
    ),
}


@pytest.fixture(scope="module")
def short() -> Any:
    """The transformer without memory for its weights."""
    return build_meta_transformer(SHORT_CONFIG)


@pytest.mark.parametrize("name", ADAPTERS)
def test_counts_are_those_of_the_real_modules(name: str, short: Any) -> None:
    adapter = ADAPTERS[name]
    config = adapter_config(adapter)
    assert isinstance(config, LokrConfig | LycorisConfig)

    selection = select_adapter(SHORT, adapter)

    assert (selection.num_modules, selection.num_parameters) == count_modules(short, config)
    assert selection.num_modules > 0


@pytest.mark.parametrize("settings", [{}, {"rank": 4, "use_dora": True}, {"target_modules": ("to_q_t", "w1")}])
def test_lora_s_counts_are_those_of_the_real_modules(settings: dict[str, Any], short: Any) -> None:
    selection = select_adapter(SHORT, LoraAdapter(**settings))
    adapter = attach_adapter(short, LoraConfig(**settings))
    adapter.detach()

    assert (selection.num_modules, selection.num_parameters) == (adapter.num_modules, adapter.num_parameters)
    assert list(selection.names) == list(adapter.selected)


def test_lora_adapts_192_modules_of_the_released_model() -> None:
    """Spec 4.8: 983,040 numbers for each rank."""
    selection = select_adapter(RELEASED, LoraAdapter(rank=16))

    assert (selection.num_modules, selection.num_parameters) == (192, 983_040 * 16)


def test_full_rank_trains_every_weight_of_the_released_model() -> None:
    selection = select_adapter(RELEASED, FullRank())

    assert (selection.num_modules, selection.num_parameters) == (1128, 17_105_733_184)


def test_boft_that_cannot_be_split_says_so() -> None:
    assert butterfly_factorization(2560, 4) is None
    with pytest.raises(ValueError, match=r"cannot split 2560 outputs .* raise linear_dim"):
        select_adapter(RELEASED, lycoris("boft", linear_dim=4))


@pytest.mark.parametrize("preset", [NAMED, NESTED, replace(NESTED, target_module=("Linear",))])
def test_the_names_are_those_of_lycoris_itself(preset: LokrPreset, short: Any) -> None:
    from lycoris.wrapper import LycorisNetwork
    from reverie_common.lycoris_presets import CLASS_ALIASES

    saved = {name: getattr(LycorisNetwork, name) for name in dir(LycorisNetwork) if name.isupper() and name[0] != "_"}
    try:
        LycorisNetwork.apply_preset(
            {
                "enable_conv": False,
                "target_module": [CLASS_ALIASES.get(name, name) for name in preset.target_module],
                "target_name": list(preset.target_name),
                "exclude_name": list(preset.exclude_name),
                "module_algo_map": {CLASS_ALIASES.get(name, name): {} for name in preset.module_algo_map},
                "name_algo_map": {name: {} for name in preset.name_algo_map},
                "use_fnmatch": preset.use_fnmatch,
            }
        )
        network = LycorisNetwork(short, lora_dim=4, network_module="ia3", warn_on_unmatched=False)
        expected = [module.lora_name.removeprefix("lycoris_") for module in network.loras]
    finally:
        for name, value in saved.items():
            setattr(LycorisNetwork, name, value)

    names = [name.replace(".", "_") for name in select_adapter(SHORT, LokrAdapter(apply_preset=preset)).names]
    assert sorted(names) == sorted(expected)


def test_a_job_s_adapter_becomes_the_same_configuration(tmp_path: Path) -> None:
    adapter = LokrAdapter(dropout=0.1, rank_dropout=0.2, module_dropout=0.3, dora_wd=True, apply_preset=NAMED)
    config = adapter_config(adapter)
    assert isinstance(config, LokrConfig)

    text = json.loads(config.to_json())

    assert (text["dropout"], text["rank_dropout"], text["module_dropout"], text["dora_wd"]) == (0.1, 0.2, 0.3, True)
    assert text["apply_preset"]["target_name"] == ["final_layer.linear", "caption_projection.*"]
    assert text["apply_preset"]["exclude_name"] == ["*.to_out", "double_stream_blocks.3.*"]


def test_every_kind_has_a_configuration() -> None:
    configs: list[AdapterConfig] = [
        adapter_config(kind) for kind in (LokrAdapter(), LycorisAdapter(algo="loha"), LoraAdapter(), FullRank())
    ]

    assert [type(config).__name__ for config in configs] == [
        "LokrConfig",
        "LycorisConfig",
        "LoraConfig",
        "FullRankConfig",
    ]
