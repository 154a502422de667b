"""What is written into an adapter file besides its tensors: a function of the job and its data only (spec 4.6)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from typing import Any

from reverie_hidream.adapters.config import (
    AdapterConfig,
    FullRankConfig,
    LokrConfig,
    LokrOverrides,
    LokrPreset,
    LoraConfig,
    LycorisConfig,
)

from reverie_trainer.jobs.admission.adapter_counts import option_value
from reverie_trainer.jobs.spec import Adapter, FullRank, JobSpec, LokrAdapter, LoraAdapter, LycorisAdapter
from reverie_trainer.jobs.spec import LokrOverrides as ChosenOverrides
from reverie_trainer.jobs.spec import LokrPreset as ChosenPreset
from reverie_trainer.worker.samples import PreparedData


def adapter_config(adapter: Adapter) -> AdapterConfig:
    """The adapter of a job as the model's code takes it, complete.

    Raises:
        AdapterConfigError: a value has no meaning.
    """
    if isinstance(adapter, LokrAdapter):
        return lokr_config(adapter)
    if isinstance(adapter, LycorisAdapter):
        return _lycoris_config(adapter)
    if isinstance(adapter, LoraAdapter):
        return LoraConfig(**{item.name: getattr(adapter, item.name) for item in fields(adapter)})
    return FullRankConfig()


def lokr_config(adapter: LokrAdapter) -> LokrConfig:
    """A LoKr as LyCORIS' configuration, complete.

    Raises:
        AdapterConfigError: a value has no meaning.
    """
    own = {item.name: getattr(adapter, item.name) for item in fields(adapter) if item.name != "apply_preset"}
    return LokrConfig(**own, apply_preset=_preset(adapter.apply_preset))


def _lycoris_config(adapter: LycorisAdapter) -> LycorisConfig:
    own = {
        item.name: getattr(adapter, item.name)
        for item in fields(adapter)
        if item.name not in ("apply_preset", "options")
    }
    options: dict[str, Any] = {name: option_value(name, text) for name, text in adapter.options.items()}
    return LycorisConfig(**own, **options, apply_preset=_preset(adapter.apply_preset))


def _preset(preset: ChosenPreset) -> LokrPreset:
    maps = {
        name: {key: LokrOverrides(**_given(overrides)) for key, overrides in getattr(preset, name).items()}
        for name in ("module_algo_map", "name_algo_map")
    }
    return LokrPreset(
        **maps,
        target_module=preset.target_module or None,
        target_name=preset.target_name,
        exclude_name=preset.exclude_name,
        use_fnmatch=preset.use_fnmatch,
        enable_conv=preset.enable_conv,
    )


def lycoris_config_file(adapter: Adapter) -> bytes | None:
    """`lycoris_config.json`; None for what is no adapter of LyCORIS."""
    config = adapter_config(adapter)
    return (config.to_json() + "\n").encode() if isinstance(config, LokrConfig | LycorisConfig) else None


def adapter_metadata(spec: JobSpec, data: PreparedData, step: int) -> dict[str, str]:
    """Metadata of the adapter file at a step, besides `lycoris_config`, which the export writes by itself."""
    model = f"HiDream-I1-{spec.model.flavour.capitalize()}"
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"hidream-{spec.model.flavour}" + ("" if is_whole_model(spec.adapter) else "/lora"),
        "modelspec.implementation": "diffusers",
        "modelspec.title": spec.name,
        "modelspec.resolution": _resolution(data),
        "modelspec.description": f"{_kind(spec.adapter)} for {model}, {step} steps",
        "global_step": str(step),
    }
    if spec.trigger_words:
        metadata["modelspec.trigger_phrase"] = ", ".join(spec.trigger_words)
        metadata["trained_words"] = json.dumps(list(spec.trigger_words))
        metadata["ss_tag_frequency"] = json.dumps(_tag_frequency(spec, data), sort_keys=True)
    return metadata


def is_whole_model(adapter: Adapter | None) -> bool:
    """Whether the file of this adapter is the whole transformer."""
    return isinstance(adapter, FullRank)


def _kind(adapter: Adapter | None) -> str:
    if isinstance(adapter, LycorisAdapter):
        return f"LyCORIS {adapter.algo}"
    return {LoraAdapter: "LoRA", FullRank: "All weights"}.get(type(adapter), "LyCORIS LoKr")


def _given(overrides: ChosenOverrides) -> dict[str, Any]:
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
