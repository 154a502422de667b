"""SimpleTuner's LyCORIS file."""

from collections.abc import Callable
from typing import Any

import pytest
from reverie_client.simpletuner import Imported, ReportLine

Bring = Callable[..., Imported]
LineOf = Callable[[Imported, str], ReportLine]

LOKR = {"algo": "lokr", "multiplier": 1, "linear_dim": 64, "linear_alpha": 1, "factor": 8}


def test_what_is_missing_has_the_librarys_defaults(bring: Bring) -> None:
    imported = bring(lycoris={"algo": "lokr", "multiplier": 1, "linear_dim": 64, "linear_alpha": 1})
    lokr = imported.document["adapter"]["lokr"]
    assert (lokr["factor"], lokr["full_matrix"]) == (-1, False)


def test_every_field_arrives(bring: Bring) -> None:
    fields = {
        **LOKR,
        "full_matrix": "false",
        "use_scalar": "true",
        "decompose_both": True,
        "dropout": 0.1,
        "rank_dropout": 0.2,
        "module_dropout": 0.3,
        "dora_wd": True,
    }
    expected = {
        **{key: value for key, value in fields.items() if key != "algo"},
        "full_matrix": False,
        "use_scalar": True,
    }
    assert bring(lycoris=fields).document["adapter"]["lokr"] == expected


def test_fractions_are_kept_and_told(bring: Bring, line_of: LineOf) -> None:
    imported = bring(lycoris={**LOKR, "linear_alpha": 0.5})
    assert imported.document["adapter"]["lokr"]["linear_alpha"] == 0.5
    assert line_of(imported, "linear_alpha").outcome == "changed"
    assert line_of(imported, "multiplier").outcome == "honoured"


def test_names_are_regular_expressions_unless_the_file_says_otherwise(bring: Bring) -> None:
    preset = {"name_algo_map": {".*attn.*": {"factor": 4}}}
    assert bring(lycoris={**LOKR, "apply_preset": preset}).document["adapter"]["lokr"]["apply_preset"] == {
        **preset,
        "use_fnmatch": False,
    }


def test_presets_of_classes_names_and_exceptions_arrive(bring: Bring, line_of: LineOf) -> None:
    preset = {
        "target_module": ["Attention", "FeedForward"],
        "target_name": ["x_embedder*"],
        "exclude_name": ["*.experts.*"],
        "use_fnmatch": True,
        "module_algo_map": {"Attention": {"factor": "16"}, "FeedForward": {"algo": "lokr", "dim": 8, "alpha": 2}},
    }
    imported = bring(lycoris={**LOKR, "apply_preset": preset})
    assert imported.document["adapter"]["lokr"]["apply_preset"] == {
        **preset,
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"linear_dim": 8, "linear_alpha": 2}},
    }
    assert line_of(imported, "apply_preset.module_algo_map.FeedForward.algo").outcome == "ignored"
    assert not imported.report.has_refusals


def test_a_mixture_of_algorithms_is_the_other_kind_of_adapter(bring: Bring) -> None:
    preset = {"target_module": ["Attention"], "module_algo_map": {"Attention": {"algo": "lora", "dim": 4}}}
    adapter = bring(lycoris={**LOKR, "apply_preset": preset}).document["adapter"]["lycoris"]
    assert (adapter["algo"], adapter["options"]) == ("lokr", {"factor": "8"})
    assert adapter["apply_preset"]["module_algo_map"] == {"Attention": {"algo": "locon", "linear_dim": 4}}


def test_other_algorithms_keep_their_own_settings(bring: Bring) -> None:
    oft = {"algo": "oft", "multiplier": 1, "linear_dim": 4, "linear_alpha": 1, "constraint": 0.1, "rescaled": True}
    assert bring(lycoris=oft).document["adapter"] == {
        "lycoris": {
            "algo": "diag-oft",
            "multiplier": 1,
            "linear_dim": 4,
            "linear_alpha": 1,
            "options": {"constraint": "0.1", "rescaled": "true"},
        }
    }


@pytest.mark.parametrize(
    ("more", "key", "reason"),
    [
        ({"algo": "lokrr"}, "algo", "lokr"),
        ({"rank": 4}, "rank", "no such setting"),
        ({"linear_dim": 0}, "linear_dim", "1"),
        ({"apply_preset": {"target_modul": ["Attention"]}}, "apply_preset.target_modul", "target_module"),
        ({"apply_preset": {"target_module": "Attention"}}, "apply_preset.target_module", "list"),
        (
            {"apply_preset": {"module_algo_map": {"Attention": {"algo": "lohaa"}}}},
            "apply_preset.module_algo_map.Attention.algo",
            "loha",
        ),
        ({"apply_preset": []}, "apply_preset", "object"),
    ],
)
def test_what_does_not_work_is_refused(
    bring: Bring, line_of: LineOf, more: dict[str, Any], key: str, reason: str
) -> None:
    line = line_of(bring(lycoris={**LOKR, **more}), key)
    assert line.outcome == "refused"
    assert reason in line.reason
