"""LoKr configurations in LyCORIS' JSON form."""

import json
import math
from typing import Any

import pytest
from reverie_hidream.adapters import AdapterConfigError, LokrConfig, LokrOverrides, LokrPreset

SIMPLETUNER: dict[str, Any] = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 16384,
    "linear_alpha": 1,
    "full_matrix": True,
    "use_scalar": True,
    "factor": 16,
    "apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 16}}},
}


def test_reads_simpletuner_s_configuration() -> None:
    config = LokrConfig.from_dict(SIMPLETUNER)

    assert config == LokrConfig(
        factor=16,
        use_scalar=True,
        apply_preset=LokrPreset(target_module=("Attention",), module_algo_map={"Attention": LokrOverrides(factor=16)}),
    )


def test_writes_what_it_reads_with_the_caller_s_class_names() -> None:
    written = LokrConfig.from_dict(SIMPLETUNER).to_dict()

    assert written == {**SIMPLETUNER, "decompose_both": False}
    assert LokrConfig.from_dict(written) == LokrConfig.from_dict(SIMPLETUNER)
    assert json.loads(LokrConfig.from_dict(SIMPLETUNER).to_json()) == written


def test_keeps_a_fractional_alpha() -> None:
    config = LokrConfig.from_dict({**SIMPLETUNER, "linear_alpha": 0.5})

    assert config.linear_alpha == 0.5
    assert config.to_dict()["linear_alpha"] == 0.5


def test_fields_left_out_are_lycoris_s_own_defaults() -> None:
    config = LokrConfig.from_dict({"algo": "lokr"})

    assert (config.factor, config.linear_dim, config.full_matrix, config.use_scalar) == (-1, 4, False, False)
    assert config.apply_preset == LokrPreset(target_module=("Attention",))


def test_overrides_may_use_either_spelling() -> None:
    short, long = (
        LokrConfig.from_dict({**SIMPLETUNER, "apply_preset": {"name_algo_map": {"x": overrides}}})
        for overrides in ({"dim": 8, "alpha": 2}, {"linear_dim": 8, "linear_alpha": 2})
    )

    assert short == long
    assert short.apply_preset.to_dict() == {"name_algo_map": {"x": {"dim": 8, "alpha": 2.0}}}


def test_settings_that_mean_off_are_accepted() -> None:
    off = {"dropout": 0.0, "rank_dropout": 0, "module_dropout": None, "dora_wd": False, "bypass_mode": True}

    assert LokrConfig.from_dict({**SIMPLETUNER, **off}) == LokrConfig.from_dict(SIMPLETUNER)


def test_every_problem_is_named_at_once() -> None:
    broken = {
        "algo": "loha",
        "factor": "16",
        "train_norm": True,
        "linear_dims": 4,
        "apply_preset": {
            "target_module": "Attention",
            "use_fnmatch": 1,
            "name_algo_map": {"blocks.*": {"ranks": 3, "factor": True}},
            "target_modules": [],
        },
    }

    with pytest.raises(AdapterConfigError) as caught:
        LokrConfig.from_dict(broken)

    for part in (
        "algo 'loha' is not supported",
        "factor must be a whole number; got '16'",
        "train_norm True is not supported",
        "linear_dims is unknown",
        "apply_preset.target_module must be a list of strings",
        "apply_preset.use_fnmatch must be a true or false",
        "apply_preset.name_algo_map.blocks.*.ranks is unknown",
        "apply_preset.name_algo_map.blocks.*.factor must be a whole number",
        "apply_preset.target_modules is unknown",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("factor", 0, "factor 0 must be -1 or at least 1"),
        ("linear_dim", 0, "linear_dim 0 must be at least 1"),
        ("linear_alpha", -1.0, "linear_alpha -1.0 must not be below 0"),
        ("linear_alpha", math.nan, "linear_alpha nan must be a finite number"),
        ("multiplier", math.inf, "multiplier inf must be a finite number"),
    ],
)
def test_refuses_values_without_meaning(field: str, value: float, message: str) -> None:
    with pytest.raises(AdapterConfigError, match=message):
        LokrConfig.from_dict({**SIMPLETUNER, field: value})


def test_a_configuration_is_an_object() -> None:
    with pytest.raises(AdapterConfigError, match="apply_preset must be an object"):
        LokrConfig.from_dict({**SIMPLETUNER, "apply_preset": ["Attention"]})
