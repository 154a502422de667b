"""What a job's adapter may say: each rule with its value, limit and remedy; and nothing that works is refused."""

from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from reverie.training.v1 import job_pb2
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.spec import spec_from_proto

MINIMAL: dict[str, Any] = {"name": "cats", "datasets": [{"dataset": "cats"}], "optimization": {"max_steps": 5}}


def violations(adapter: dict[str, Any], **changes: Any) -> dict[str, str]:
    spec = spec_from_proto(ParseDict({**MINIMAL, "adapter": adapter, **changes}, job_pb2.TrainingJobSpec()))
    return {violation.field: violation.description for violation in check_spec(spec)}


def of(kind: str, settings: dict[str, Any], **changes: Any) -> dict[str, str]:
    return violations({kind: settings}, **changes)


INT8 = {"model": {"base_precision": "int8-quanto"}}


@pytest.mark.parametrize(
    "adapter",
    [
        {"lokr": {"dropout": 0.1, "rank_dropout": 0.2, "module_dropout": 0.3, "dora_wd": True, "bypass_mode": True}},
        {"lokr": {"init_lokr_norm": 1e-3}},
        {"lokr": {"apply_preset": {"target_name": ["*.to_q"], "exclude_name": ["*.1.*"], "enable_conv": True}}},
        {"lokr": {"apply_preset": {"module_algo_map": {"Attention": {"dropout": 0.5}}}}},
        {"lycoris": {"algo": "locon", "dora_wd": True, "use_scalar": True}},
        {"lycoris": {"algo": "dylora", "linear_dim": 8, "options": {"block_size": "4"}}},
        {"lycoris": {"algo": "diag-oft", "options": {"constraint": "0.1", "rescaled": "true"}}},
        {"lycoris": {"algo": "loha", "apply_preset": {"module_algo_map": {"Attention": {"algo": "ia3"}}}}},
        {"lora": {"rank": 4, "alpha": 1.0, "init_type": "pissa", "format": "comfyui", "dropout": 0.1}},
        {"lora": {"use_dora": True}},
        {"full_rank": {}},
    ],
)
def test_what_works_is_accepted(adapter: dict[str, Any]) -> None:
    assert violations(adapter) == {}


@pytest.mark.parametrize(
    ("found", "field", "words"),
    [
        (of("lokr", {"dropout": 1.0}), "adapter.lokr.dropout", "1.0 is outside 0 to below 1"),
        (of("lokr", {"init_lokr_norm": -1}), "adapter.lokr.init_lokr_norm", "above 0"),
        (
            of("lokr", {"apply_preset": {"module_algo_map": {"Attention": {"algo": "loha"}}}}),
            "adapter.lokr.apply_preset.module_algo_map['Attention'].algo",
            "use adapter.lycoris for a mixture",
        ),
        (
            of("lokr", {"apply_preset": {"use_fnmatch": False, "target_name": ["("]}}),
            "adapter.lokr.apply_preset.target_name['(']",
            "no regular expression",
        ),
        (of("lycoris", {}), "adapter.lycoris.algo", "expected one of lokr, locon"),
        (of("lycoris", {"algo": "lohaa"}), "adapter.lycoris.algo", "did you mean 'loha'"),
        (of("lycoris", {"algo": "tlora"}), "adapter.lycoris.algo", "singular value decomposition"),
        (of("lycoris", {"algo": "norm"}), "adapter.lycoris.algo", "HiDream's norms have no weights"),
        (of("lycoris", {"algo": "ia3", "dora_wd": True}), "adapter.lycoris.dora_wd", "ia3 has no dora_wd"),
        (
            of("lycoris", {"algo": "locon", "options": {"block_size": "4"}}),
            "adapter.lycoris.options['block_size']",
            "locon has no option 'block_size'; it knows none",
        ),
        (
            of("lycoris", {"algo": "dylora", "options": {"block_size": "four"}}),
            "adapter.lycoris.options['block_size']",
            "'four' is no whole number",
        ),
        (
            of("lycoris", {"algo": "dylora", "linear_dim": 6}),
            "adapter.lycoris.linear_dim",
            "6 is no multiple of options.block_size 4",
        ),
        (
            of("lycoris", {"algo": "loha", "apply_preset": {"name_algo_map": {"*.to_q": {"factor": 4}}}}),
            "adapter.lycoris.apply_preset.name_algo_map['*.to_q'].factor",
            "loha has no factor",
        ),
        (of("lora", {"rank": 257}), "adapter.lora.rank", "257 is outside 1 to 256"),
        (of("lora", {"init_type": "loftq"}), "adapter.lora.init_type", "expected one of default, gaussian"),
        (of("lora", {"format": "kohya"}), "adapter.lora.format", "diffusers, comfyui"),
        (of("lora", {"target_modules": [""]}), "adapter.lora.target_modules", "would match every module"),
        (of("lora", {"use_dora": True}, **INT8), "adapter.lora.use_dora", "'int8-quanto'; set that to no_change"),
        (of("lora", {"use_dora": True, "init_type": "olora"}), "adapter.lora.init_type", "excludes use_dora"),
        (of("full_rank", {}, **INT8), "model.base_precision", "cannot be trained at full rank"),
    ],
)
def test_violation_names_field_value_and_remedy(found: dict[str, str], field: str, words: str) -> None:
    assert words in found[field]
