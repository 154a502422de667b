"""What is said of a job's optimiser before it is accepted, without torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from reverie.training.v1.job_pb2 import TrainingJobSpec
from reverie_client.specs import load_job_spec
from reverie_common.optimizer_catalogue import CATALOGUE, REFUSED, SCHEDULES, parse_options
from reverie_trainer.jobs.checks import check_spec
from reverie_trainer.jobs.spec import JobSpec, spec_from_proto, spec_to_proto

ROOT = Path(__file__).parents[3]
JOBS = ROOT / "examples" / "jobs"
PAGE = (ROOT / "docs" / "optimizers.md").read_text()

MINIMAL = {
    "name": "cat",
    "datasets": [{"dataset": "cats"}],
    "adapter": {"lokr": {}},
}


def spec_of(optimization: dict[str, Any], **changes: Any) -> JobSpec:
    record = {**MINIMAL, "optimization": {"max_steps": 5, **optimization}, **changes}
    return spec_from_proto(ParseDict(record, TrainingJobSpec()))


def violations(optimization: dict[str, Any], **changes: Any) -> dict[str, str]:
    found = {item.field: item.description for item in check_spec(spec_of(optimization, **changes))}
    return {field.removeprefix("optimization."): text for field, text in found.items()}


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_optimiser_of_the_table_is_accepted_with_its_own_defaults(name: str) -> None:
    spec = spec_of({"optimizer": name})

    assert violations({"optimizer": name}) == {}
    assert spec.optimization.weight_decay == CATALOGUE[name].weight_decay
    assert spec.optimization.learning_rate == CATALOGUE[name].learning_rate
    assert spec_from_proto(spec_to_proto(spec)) == spec


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_optimiser_names_one_that_works(name: str) -> None:
    why, nearest = REFUSED[name]
    text = violations({"optimizer": name})["optimizer"]

    assert nearest in CATALOGUE
    assert text == f"optimizer {name!r} is not offered: {why}; use {nearest}"


def test_deepspeed_and_unknown_names_are_refused_with_the_nearest() -> None:
    assert "DeepSpeed; use adamw" in violations({"optimizer": "deepspeed-adam"})["optimizer"]
    assert "did you mean 'optimi-lion'?" in violations({"optimizer": "optimi-loin"})["optimizer"]


@pytest.mark.parametrize(
    ("optimization", "field", "words"),
    [
        ({"optimizer_config": {"esp": "1"}}, "optimizer_config[esp]", "adamw has no setting 'esp', only amsgrad, eps"),
        ({"optimizer_config": {"eps": "x"}}, "optimizer_config[eps]", "give a number above 0 (default 1e-08)"),
        ({"optimizer_config": {"eps": "0"}}, "optimizer_config[eps]", "'0' is no value of adamw's eps"),
        ({"optimizer_config": {"amsgrad": "perhaps"}}, "optimizer_config[amsgrad]", "true or false (default false)"),
        ({"optimizer_config": {"lr": "1"}}, "optimizer_config[lr]", "use the field learning_rate"),
        ({"optimizer_config": {"betas": "1"}}, "optimizer_config[betas]", "use the field beta1 and beta2"),
        ({"beta1": 1.0}, "beta1", "1.0 is not at least 0 and below 1"),
        ({"beta2": -0.1}, "beta2", "-0.1"),
        ({"optimizer": "optimi-sgd", "beta1": 0.9}, "beta1", "optimi-sgd has no beta1"),
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "learning_rate", "leave it out or give 1"),
        ({"gradient_release": True, "optimizer": "prodigy"}, "gradient_release", "prodigy needs all gradients"),
        ({"gradient_release": True, "gradient_accumulation_steps": 2}, "gradient_release", "accumulation_steps 2"),
        ({"gradient_release": True, "grad_clip_method": "norm"}, "gradient_release", "set max_grad_norm to 0"),
        ({"lr_end": 1e-6}, "lr_end", "constant_with_warmup has no end"),
        ({"lr_scheduler": "linear", "lr_end": -1.0}, "lr_end", "at least 0"),
        ({"lr_scheduler": "linear", "lr_end": 1e-3}, "lr_end", "0.001 is above learning_rate 0.0001"),
        ({"lr_scheduler": "cosine", "lr_power": 2.0}, "lr_power", "cosine has no exponent"),
        ({"lr_scheduler": "polynomial", "lr_power": 0.0}, "lr_power", "above 0"),
        ({"lr_scheduler": "cosine", "lr_num_cycles": 2}, "lr_num_cycles", "cosine has no cycles"),
        ({"lr_scheduler": "sine", "lr_num_cycles": 0}, "lr_num_cycles", "1 to 1000000"),
    ],
)
def test_refuses_with_the_field_and_the_remedy(optimization: dict[str, Any], field: str, words: str) -> None:
    found = violations(optimization)

    assert list(found) == [field]
    assert words in found[field]


@pytest.mark.parametrize(
    "optimization",
    [
        {
            "optimizer": "bnb-lion8bit-paged",
            "optimizer_config": {"min_8bit_size": "8192"},
            "beta1": 0.95,
            "beta2": 0.98,
        },
        {"optimizer": "prodigy", "learning_rate": 1.0, "optimizer_config": {"d_coef": "0.5", "use_speed": "True"}},
        {"gradient_release": True, "grad_clip_method": "value", "max_grad_norm": 0.01},
        {"gradient_release": True, "grad_clip_method": "norm", "max_grad_norm": 0.0},
        {"lr_scheduler": "polynomial", "lr_end": 4e-7, "lr_power": 0.8, "lr_warmup_steps": 100},
        {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3},
        {"lr_scheduler": "constant", "lr_warmup_steps": 10},
    ],
)
def test_accepts_what_goes_together(optimization: dict[str, Any]) -> None:
    assert violations(optimization) == {}


@pytest.mark.parametrize(
    ("ema", "field", "words"),
    [
        ({"decay": 1.0}, "ema.decay", "below 1"),
        ({"decay": "NaN"}, "ema.decay", "nan"),
        ({"update_interval": 0}, "ema.update_interval", "raise"),
        ({"warmup_steps": 2_000_000}, "ema.warmup_steps", "lower"),
        ({"update_interval": 6}, "ema.update_interval", "6 is above max_steps 5, and the average would never"),
        ({"warmup_steps": 6}, "ema.warmup_steps", "stay a copy of the adapter"),
        ({"validation": "both"}, "ema.validation", "none, ema_only, comparison"),
    ],
)
def test_refuses_what_is_no_average(ema: dict[str, Any], field: str, words: str) -> None:
    found = violations({}, ema=ema)

    assert list(found) == [field]
    assert words in found[field]


def test_an_average_may_be_kept() -> None:
    assert violations({}, ema={"decay": 0.9999, "update_interval": 5, "validation": "ema_only"}) == {}


def test_settings_are_read_with_their_type() -> None:
    given = {"eps": "1e-6", "beta3": "0.95", "adam_wd": "TRUE"}

    assert parse_options("optimi-adan", given) == {"eps": 1e-6, "beta3": 0.95, "adam_wd": True}
    assert parse_options("soap", {"precondition_frequency": "20"}) == {"precondition_frequency": 20}


def test_the_checks_do_without_torch() -> None:
    program = "import sys, reverie_trainer.jobs.checks; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", ["prodigy-ema", "gradient-release"])
def test_the_examples_are_right(name: str) -> None:
    spec = spec_from_proto(load_job_spec(JOBS / f"{name}.yaml"))

    assert check_spec(spec) == []
    assert spec.name == name


def test_the_page_has_a_row_for_every_optimiser_and_every_refusal() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]
    by_name = {row[0].strip("`"): row for row in rows}

    for name, entry in CATALOGUE.items():
        _, library, betas, weight_decay, state, _, settings = by_name[name]
        assert library == entry.library
        assert betas == (" ".join(f"{beta:g}" for beta in entry.betas) if entry.betas else "-")
        assert float(weight_decay) == entry.weight_decay
        assert float(state) == pytest.approx(entry.state_bytes, rel=1e-3)
        assert [word for word in settings.replace("`", "").split(", ") if word] == list(entry.options)
    for name, (why, nearest) in REFUSED.items():
        assert by_name[name] == [f"`{name}`", why, f"`{nearest}`"]
    assert [schedule for schedule in SCHEDULES if f"`{schedule}`" not in PAGE] == []
