"""What adapters select, against the published counts (spec 4.2, 4.3, 12.2) and against LyCORIS and diffusers."""

import dataclasses

import pytest
from reverie_common.lycoris_presets import factorization
from reverie_trainer.jobs.admission.adapter_counts import module_parameters, settings_of
from reverie_trainer.jobs.admission.adapter_selection import (
    TransformerConfig,
    enumerate_modules,
    num_transformer_parameters,
    select_adapter,
)
from reverie_trainer.jobs.spec import LokrAdapter, LokrOverrides, LokrPreset

RELEASED = TransformerConfig(
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=16,
    num_single_layers=32,
    attention_head_dim=128,
    num_attention_heads=20,
    caption_channels=(4096, 4096),
    text_emb_dim=2048,
    num_routed_experts=4,
    llama_layers=(*range(32), *[31] * 16),
    max_resolution=(128, 128),
)

ATTENTION = LokrPreset(target_module=("Attention",))
FEED_FORWARD = LokrPreset(target_module=("Attention", "FeedForward"))
BY_NAME = LokrPreset(
    name_algo_map={
        "double_stream_blocks.*.block.attn*": LokrOverrides(),
        "double_stream_blocks.*.block.ff_t*": LokrOverrides(),
        "double_stream_blocks.*.block.ff_i.shared_experts*": LokrOverrides(),
        "single_stream_blocks.*.block.attn*": LokrOverrides(),
        "single_stream_blocks.*.block.ff_i.shared_experts*": LokrOverrides(),
    }
)


def test_released_model_has_the_published_size() -> None:
    assert num_transformer_parameters(RELEASED) == 17_105_733_184
    assert sum(module.shape is not None for module in enumerate_modules(RELEASED)) == 1128


@pytest.mark.parametrize(
    ("preset", "num_modules", "totals"),
    [
        (ATTENTION, 256, {4: 104_861_696, 8: 26_230_784, 16: 6_619_136, 25: 4_296_704, -1: 1_458_176}),
        (FEED_FORWARD, 1024, {4: 877_543_424, 8: 219_447_296, 16: 55_107_584, 25: 31_774_208, -1: 8_001_536}),
        (BY_NAME, 448, {4: 240_524_288, 8: 60_157_952, 16: 15_147_008, 25: 10_264_064, -1: 2_803_712}),
    ],
)
def test_selections_are_those_of_the_specification(
    preset: LokrPreset, num_modules: int, totals: dict[int, int]
) -> None:
    selections = {
        factor: select_adapter(RELEASED, LokrAdapter(apply_preset=preset, factor=factor)) for factor in totals
    }
    assert {selection.num_modules for selection in selections.values()} == {num_modules}
    assert {factor: selection.num_parameters for factor, selection in selections.items()} == totals


def test_scalar_adds_one_parameter_to_each_module() -> None:
    with_scalar = select_adapter(RELEASED, LokrAdapter(apply_preset=ATTENTION, use_scalar=True))
    assert with_scalar.num_parameters == 6_619_136 + 256


def test_every_linear_can_be_selected_by_class() -> None:
    selection = select_adapter(RELEASED, LokrAdapter(apply_preset=LokrPreset(target_module=("Linear",))))
    assert (selection.num_modules, selection.num_parameters) == (1128, 67_101_824)


def test_diffusers_own_class_names_select_the_same() -> None:
    own = LokrPreset(target_module=("HiDreamAttention", "HiDreamImageFeedForwardSwiGLU"))
    assert select_adapter(RELEASED, LokrAdapter(apply_preset=own)).num_modules == 1024


def test_keys_of_module_algo_map_are_targets_with_their_own_factor() -> None:
    preset = LokrPreset(
        target_module=("Attention",),
        module_algo_map={"Attention": LokrOverrides(factor=16), "FeedForward": LokrOverrides(factor=8)},
    )
    mixed = select_adapter(RELEASED, LokrAdapter(apply_preset=preset, factor=4))
    assert mixed.num_modules == 1024
    assert mixed.num_parameters == 6_619_136 + (219_447_296 - 26_230_784)


def test_name_pattern_wins_over_class_and_may_override() -> None:
    preset = LokrPreset(
        target_module=("Attention",), name_algo_map={"*to_q": LokrOverrides(factor=-1, use_scalar=True)}
    )
    selection = select_adapter(RELEASED, LokrAdapter(apply_preset=preset))
    assert selection.num_modules == 256


def test_regular_expressions_match_from_the_start() -> None:
    preset = LokrPreset(
        name_algo_map={r"single_stream_blocks\.\d+\.block\.attn1\.to_[qk]$": LokrOverrides()}, use_fnmatch=False
    )
    assert select_adapter(RELEASED, LokrAdapter(apply_preset=preset)).num_modules == 64


@pytest.mark.parametrize(
    "preset",
    [
        LokrPreset(),
        LokrPreset(target_module=("Atention",)),
        LokrPreset(name_algo_map={"transformer_blocks.*": LokrOverrides()}),
    ],
)
def test_selection_of_nothing_is_seen_and_named(preset: LokrPreset) -> None:
    selection = select_adapter(RELEASED, LokrAdapter(apply_preset=preset))
    assert selection.num_modules == 0
    assert set(selection.unmatched) == {*preset.target_module, *preset.name_algo_map}


def lokr_parameters(shape: tuple[int, int], adapter: LokrAdapter) -> int:
    return module_parameters(shape, True, settings_of(adapter, None))


def test_low_rank_w2_counts_both_factors() -> None:
    adapter = LokrAdapter(full_matrix=False, linear_dim=8)
    assert lokr_parameters((2560, 2560), adapter) == 16 * 16 + 8 * (160 + 160)
    assert lokr_parameters((2560, 2560), dataclasses.replace(adapter, decompose_both=True)) == 16 * 16 + 8 * 320
    small = dataclasses.replace(adapter, decompose_both=True, linear_dim=4)
    assert lokr_parameters((2560, 2560), small) == 4 * 32 + 4 * 320


@pytest.mark.parametrize(
    ("dimension", "factor", "expected"),
    [
        (128, -1, (8, 16)),
        (250, 16, (10, 25)),
        (360, 8, (8, 45)),
        (360, -1, (18, 20)),
        (127, 4, (1, 127)),
        (512, 4, (4, 128)),
    ],
)
def test_factorization_is_that_of_lycoris(dimension: int, factor: int, expected: tuple[int, int]) -> None:
    assert factorization(dimension, factor) == expected


def test_configuration_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="patch_size"):
        TransformerConfig.from_json({})


def test_canvas_comes_from_the_configuration() -> None:
    assert RELEASED.max_pixels == 1024 * 1024
    assert dataclasses.replace(RELEASED, max_resolution=(32, 32)).max_pixels == 256 * 256
