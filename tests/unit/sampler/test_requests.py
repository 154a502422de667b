"""Requests to the sampler: defaults, and every limit with its own message."""

from typing import Any

import pytest
from reverie.common.v1.common_pb2 import ObjectRef
from reverie.sampling.v1.sampling_pb2 import SampleRequest
from reverie_common.errors import InvalidArgumentError
from reverie_sampler.requests import SampleOrder, SizeRule, checked_order

RULE = SizeRule(pixel_multiple=16, max_pixels=1024 * 1024)


def _check(**fields: Any) -> SampleOrder:
    request = SampleRequest(**{"prompt": "a cat", "width": 64, "height": 64, **fields})
    return checked_order(request, RULE, _key_of)


def _key_of(uri: str) -> str:
    if not uri.startswith("s3://bucket/"):
        raise InvalidArgumentError("another store")
    return uri.removeprefix("s3://bucket/")


def test_what_is_left_out_has_its_default() -> None:
    order = _check()
    assert (order.num_inference_steps, order.guidance_scale, order.num_images) == (20, 5.0, 1)
    assert (order.shift, order.adapter, order.adapter_strength, order.seed) == (None, None, 1.0, 0)


def test_zero_is_not_the_same_as_left_out() -> None:
    order = _check(guidance_scale=0.0, adapter_strength=0.0)
    assert (order.guidance_scale, order.adapter_strength, order.is_guided) == (0.0, 0.0, False)


@pytest.mark.parametrize(("scale", "is_guided"), [(1.0, False), (1.01, True)])
def test_guidance_begins_above_1(scale: float, is_guided: bool) -> None:
    assert _check(guidance_scale=scale).is_guided is is_guided


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": "x" * 8193}, "prompt"),
        ({"negative_prompt": "x" * 8193}, "negative_prompt"),
        ({"width": 0}, "width"),
        ({"width": 72}, "width"),
        ({"height": 4112}, "height"),
        ({"width": 1360, "height": 1024}, "width"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 201}, "num_inference_steps"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 17}, "num_images"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"shift": 0.0}, "shift"),
        ({"shift": float("nan")}, "shift"),
        ({"adapter_strength": float("nan")}, "adapter_strength"),
        ({"adapter": ObjectRef(uri="s3://other/key", sha256="ab")}, "adapter.uri"),
        ({"adapter": ObjectRef(uri="s3://bucket/key")}, "adapter.sha256"),
    ],
)
def test_refuses_what_is_outside_its_limits(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        _check(**fields)
    assert [violation.field for violation in refusal.value.violations] == [field]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": "x" * 8192},
        {"width": 16, "height": 16},
        {"width": 1360, "height": 768},
        {"width": 2048, "height": 2048},
        {"num_inference_steps": 200, "num_images": 16},
        {"seed": 2**64 - 1},
        {"adapter": ObjectRef(uri="s3://bucket/key", sha256="ab")},
    ],
)
def test_takes_what_is_within(fields: dict[str, Any]) -> None:
    assert _check(**fields).prompt == fields.get("prompt", "a cat")
