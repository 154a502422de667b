"""The table of measured precisions: its figures against a computation by hand."""

import math
from pathlib import Path

import pytest
import torch
from reverie_hidream.precision_report import HEADER, compare, measure_layer, measure_model, report
from reverie_hidream.precisions import PRECISIONS


def test_a_plain_layer_changes_nothing() -> None:
    figures = measure_layer("no_change")
    assert (figures.bits, figures.error, figures.kept_bytes) == (16, 0, 0)


def test_int8_is_measured_as_rounding_by_hand_gives() -> None:
    weight = torch.empty(2560, 2560, dtype=torch.bfloat16)
    weight.normal_(generator=torch.Generator().manual_seed(0))
    exact = weight.double()
    scale = exact.abs().amax(dim=1, keepdim=True) / 127
    rounded = (exact / scale).round() * scale
    expected = float((rounded - exact).norm() / exact.norm())
    figures = measure_layer("int8-quanto")
    # The library's scales are bfloat16, which rounds them by up to 2^-9.
    assert math.isclose(figures.error, expected, rel_tol=0.15)
    assert math.isclose(figures.bits, 8 + 16 / 2560, rel_tol=1e-6)


@pytest.mark.parametrize("precision", ["int8-quanto", "int8-torchao", "fp8wo-torchao", "nf4-bnb"])
def test_the_table_says_of_which_weights_copies_are_kept(precision: str) -> None:
    assert measure_layer(precision).kept_bytes == (2 if PRECISIONS[precision].keeps_copies else 0)


def test_compares_with_the_model_as_loaded() -> None:
    velocity, gradient = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
    figures = compare((velocity * 1.1, torch.tensor([1.0, 1.0])), (velocity, gradient))
    assert math.isclose(figures.velocity_error, 0.1, rel_tol=1e-5)
    assert figures.gradient_cosine is not None
    assert math.isclose(figures.gradient_cosine, math.sqrt(0.5), rel_tol=1e-6)
    assert compare((velocity, None), (velocity, gradient)).gradient_cosine is None


def test_a_model_as_loaded_differs_in_nothing(tiny_checkpoint: Path) -> None:
    plain = measure_model(tiny_checkpoint, "no_change")
    figures = compare(measure_model(tiny_checkpoint, "no_change"), plain)
    assert figures.velocity_error == 0
    assert figures.gradient_cosine == pytest.approx(1.0)


def test_rows_come_as_they_are_measured(tiny_checkpoint: Path) -> None:
    lines = report(tiny_checkpoint)
    assert (next(lines), next(lines)) == HEADER
    assert next(lines) == "| `no_change` | 16.00 | 0.00 % | 0 B per weight | 0.00 % | 1.0000 |"
