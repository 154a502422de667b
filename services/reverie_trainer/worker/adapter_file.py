"""What is written into an adapter file besides its tensors: a function of the job and its data only (spec 4.6)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from reverie_hidream.adapters.config import LokrConfig

from reverie_trainer.jobs.spec import JobSpec, LokrAdapter, LokrOverrides
from reverie_trainer.worker.samples import PreparedData


def lokr_config(adapter: LokrAdapter) -> LokrConfig:
    """The adapter of a job as LyCORIS' configuration, complete.

    Raises:
        AdapterConfigError: a value has no meaning.
    """
    preset: dict[str, Any] = {
        "target_module": list(adapter.apply_preset.target_module),
        "use_fnmatch": adapter.apply_preset.use_fnmatch,
    }
    for name in ("module_algo_map", "name_algo_map"):
        rules: Mapping[str, LokrOverrides] = getattr(adapter.apply_preset, name)
        preset[name] = {target: _given(overrides) for target, overrides in rules.items()}
    own = {item.name: getattr(adapter, item.name) for item in fields(adapter) if item.name != "apply_preset"}
    return LokrConfig.from_dict({**own, "apply_preset": preset})


def lycoris_config_file(adapter: LokrAdapter) -> bytes:
    """`lycoris_config.json`."""
    return (lokr_config(adapter).to_json() + "\n").encode()


def adapter_metadata(spec: JobSpec, data: PreparedData, step: int) -> dict[str, str]:
    """Metadata of the adapter file at a step, besides `lycoris_config`, which the export writes by itself."""
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"hidream-{spec.model.flavour}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": spec.name,
        "modelspec.resolution": _resolution(data),
        "modelspec.description": f"LyCORIS LoKr for HiDream-I1-{spec.model.flavour.capitalize()}, {step} steps",
        "global_step": str(step),
    }
    if spec.trigger_words:
        metadata["modelspec.trigger_phrase"] = ", ".join(spec.trigger_words)
        metadata["trained_words"] = json.dumps(list(spec.trigger_words))
        metadata["ss_tag_frequency"] = json.dumps(_tag_frequency(spec, data), sort_keys=True)
    return metadata


def _given(overrides: LokrOverrides) -> dict[str, Any]:
    values = {item.name: getattr(overrides, item.name) for item in fields(overrides)}
    return {name: value for name, value in values.items() if value is not None}


def _resolution(data: PreparedData) -> str:
    """The commonest size, the larger one of two as common."""
    sizes = Counter((sample.width, sample.height) for sample in data.trained_samples)
    (width, height), _ = max(sizes.items(), key=lambda item: (item[1], item[0][0] * item[0][1], item[0]))
    return f"{width}x{height}"


def _tag_frequency(spec: JobSpec, data: PreparedData) -> dict[str, dict[str, int]]:
    """Images that each trigger word stands for, by dataset."""
    images = Counter(sample.dataset for sample in data.trained_samples)
    return {dataset: dict.fromkeys(spec.trigger_words, count) for dataset, count in images.items()}
