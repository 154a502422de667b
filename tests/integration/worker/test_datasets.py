"""Datasets in the worker: steps, roles and masks, from the manifest to the loss and through a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from google.protobuf.json_format import MessageToDict
from reverie_common.storage import get_object, put_object, put_tensor
from reverie_common.storage.keys import checkpoint_manifest_key, prepared_key
from reverie_hidream.tensor_io import to_raw

Work = Callable[..., int]


def rewritten(prepared: Any, name: str, change: Callable[[dict[str, Any]], None]) -> Any:
    """The same pictures under another manifest."""
    manifest = json.loads(get_object(prepared.store, prepared.manifest))
    change(manifest)
    digest = name.encode().hex().ljust(64, "0")
    ref = put_object(prepared.store, prepared_key(digest), json.dumps(manifest).encode(), "application/json")
    return replace(prepared, manifest=ref)


def split(**second: Any) -> Callable[[dict[str, Any]], None]:
    """Give the second half of the pictures to a source of their own, which trains from step 4 on."""

    def change(manifest: dict[str, Any]) -> None:
        first = manifest["datasets"][0]
        manifest["datasets"] = [{**first, "end_step": 3}, {**first, "start_step": 4, **second}]
        for sample in manifest["samples"][2:]:
            sample["source"] = 1

    return change


def test_regularisation_begins_at_its_step_with_nothing_to_correct(prepared: Any, work: Work) -> None:
    def change(manifest: dict[str, Any]) -> None:
        first = manifest["datasets"][0]
        manifest["datasets"] = [{**first, "role": "regularisation", "end_step": 1}, {**first, "start_step": 2}]
        for sample in manifest["samples"][2:]:
            sample["source"] = 1

    trainer = rewritten(prepared, "reg", change).trainer(name="job-reg")
    assert work(trainer) == 0
    figures = trainer.of_kind("step")
    # The adapter has learnt nothing yet: its prediction is the base model's own (spec 12.2).
    assert figures[0].regularisation_loss == pytest.approx(0.0, abs=1e-9)
    assert [each.HasField("regularisation_loss") for each in figures] == [True] + [False] * 5
    assert all(each.loss > 0 for each in figures[1:])


def test_a_job_whose_datasets_change_is_resumed_exactly(prepared: Any, work: Work) -> None:
    data = rewritten(prepared, "split", split(timestep_sampling_offset=0.5))
    straight = data.trainer(name="job-straight")
    assert work(straight) == 0
    # Two pictures in an epoch of either dataset, a step each.
    epochs = [figures.epoch for figures in straight.of_kind("step")]
    assert epochs == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    key = checkpoint_manifest_key("job-straight", 4)
    resumed = data.trainer(
        name="job-straight", checkpoint=put_object(prepared.store, key, prepared.store.get(key), "application/json")
    )
    resumed.job.step = 4
    assert work(resumed) == 0
    assert list(resumed.losses()) == [5, 6]
    assert resumed.losses() == {step: straight.losses()[step] for step in (5, 6)}
    assert resumed.completions[0].adapter.sha256 == straight.completions[0].adapter.sha256


@pytest.mark.parametrize("mask_type", ["mask", "segmentation"])
def test_a_mask_weighs_the_loss(prepared: Any, work: Work, mask_type: str) -> None:
    half = put_tensor(prepared.store, "v1/test/half", "mask", to_raw(torch.full((1, 16, 16), 0.5)), compressed=False)

    def change(manifest: dict[str, Any]) -> None:
        manifest["datasets"][0]["mask_type"] = mask_type
        manifest["samples"] = [each for each in manifest["samples"] if (each["width"], each["height"]) == (128, 128)]
        for sample in manifest["samples"]:
            sample["mask"] = MessageToDict(half, preserving_proto_field_name=True)

    def unmasked(manifest: dict[str, Any]) -> None:
        change(manifest)
        manifest["datasets"][0]["mask_type"] = "none"

    losses = {}
    for name, make in (("masked", change), ("unmasked", unmasked)):
        trainer = rewritten(prepared, f"{name}-{mask_type}", make).trainer(
            name=f"job-{name}-{mask_type}", optimization={"max_steps": 1, "lr_warmup_steps": 0}
        )
        assert work(trainer) == 0
        losses[name] = trainer.losses()[1]
    # Half of everything counts, or, as a segmentation, everything.
    weight = 0.5 if mask_type == "mask" else 1.0
    assert losses["masked"] == pytest.approx(weight * losses["unmasked"], rel=1e-6)
