"""The model card of a published adapter: what it is, how it was made, how to use it, what it draws."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import yaml
from google.protobuf.json_format import MessageToDict
from reverie.training.v1 import job_pb2

BASE_MODELS = {flavour: f"HiDream-ai/HiDream-I1-{flavour.capitalize()}" for flavour in ("full", "dev", "fast")}
BASE_LICENSE = "mit"
"""Licence of HiDream-I1's weights."""

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"
"""Of full-rank tuning: the whole transformer, where diffusers looks for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardSample:
    """One picture in the card."""

    prompt: str
    path: str
    """Within the repository."""


def model_card(job: job_pb2.TrainingJob, samples: Sequence[CardSample]) -> str:
    """Return the README.md of the repository."""
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_front_matter(job, samples), sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {job.spec.name}",
            "",
            _what_it_is(job),
            "",
            *_trigger_words(job),
            *_pictures(samples),
            "## How it was trained",
            "",
            *_figures(job),
            "",
            "<details><summary>The whole job</summary>",
            "",
            "```json",
            json.dumps(MessageToDict(_public(job.spec), preserving_proto_field_name=True), indent=2, sort_keys=True),
            "```",
            "",
            "</details>",
            "",
            "## How to use it",
            "",
            *_usage(job),
            "",
            "## Licence",
            "",
            f"The adapter: `{_license(job)}`. The base model's licence and use policy hold for what is drawn with it.",
            "",
        ]
    )


def result_file(job: job_pb2.TrainingJob) -> str:
    """Return the path of a job's result within the repository, and below the folder of a checkpoint."""
    return TRANSFORMER_FILE if _kind(job) == "full_rank" else ADAPTER_FILE


def _front_matter(job: job_pb2.TrainingJob, samples: Sequence[CardSample]) -> dict[str, object]:
    matter: dict[str, object] = {
        "license": _license(job),
        "base_model": _base_model(job),
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["hidream", "text-to-image", "image-to-image", _kind(job), "reverie"],
    }
    if job.spec.trigger_words:
        matter["instance_prompt"] = ", ".join(job.spec.trigger_words)
    if samples:
        matter["widget"] = [{"text": each.prompt or "(empty prompt)", "output": {"url": each.path}} for each in samples]
    return matter


def _what_it_is(job: job_pb2.TrainingJob) -> str:
    names = {"lokr": "LyCORIS LoKr", "lycoris": "LyCORIS adapter", "lora": "LoRA", "full_rank": "full-rank fine-tune"}
    return f"A {names.get(_kind(job), 'LoKr')} for [{_base_model(job)}](https://huggingface.co/{_base_model(job)})."


def _trigger_words(job: job_pb2.TrainingJob) -> list[str]:
    if not job.spec.trigger_words:
        return []
    return [f"Trigger words: {', '.join(f'`{word}`' for word in job.spec.trigger_words)}.", ""]


def _pictures(samples: Sequence[CardSample]) -> list[str]:
    if not samples:
        return []
    rows = [f"| {_cell(each.prompt)} | ![]({each.path}) |" for each in samples]
    return ["## What it draws", "", "| prompt | picture |", "| --- | --- |", *rows, ""]


def _figures(job: job_pb2.TrainingJob) -> list[str]:
    spec = job.spec
    optimization = spec.optimization
    samples = optimization.batch_size * optimization.gradient_accumulation_steps
    lines = [
        f"* {job.step} steps of {samples} samples; {job.preparation.num_images} images.",
        f"* Optimizer `{optimization.optimizer}`, learning rate {optimization.learning_rate:g}, schedule "
        f"`{optimization.lr_scheduler}`, warm-up {optimization.lr_warmup_steps} steps.",
        f"* Base held as `{spec.model.base_precision}`, computed in `{spec.model.mixed_precision}`; caption dropout "
        f"{optimization.caption_dropout_probability:g}; seed {spec.seed}.",
        f"* {job.adapter_report.num_modules} modules, {job.adapter_report.num_parameters:,} parameters.",
    ]
    sizes = ", ".join(f"{each.width}x{each.height}: {each.num_images}" for each in job.preparation.buckets)
    return [*lines, f"* Buckets: {sizes}."] if sizes else lines


def _usage(job: job_pb2.TrainingJob) -> list[str]:
    repository, file = job.spec.publishing.hub_model_id, result_file(job)
    download = ["from huggingface_hub import hf_hub_download", f'file = hf_hub_download("{repository}", "{file}")']
    kind = _kind(job)
    if kind == "lora":
        load = [f'pipeline.load_lora_weights("{repository}", weight_name="{file}")']
    elif kind == "full_rank":
        load = [
            *download,
            "from safetensors.torch import load_file",
            "pipeline.transformer.load_state_dict(load_file(file))",
        ]
    else:
        load = [
            *download,
            "from lycoris import create_lycoris_from_weights",
            "network, _ = create_lycoris_from_weights(1.0, file, pipeline.transformer)",
            # Not merge_to: lycoris-lora 4.1.3 multiplies by the scale of a split LoKr and a LoHa twice there.
            "network.apply_to()",
        ]
    return ["```python", "# pipeline: diffusers' HiDreamImagePipeline of the base model", *load, "```"]


def _public(spec: job_pb2.TrainingJobSpec) -> job_pb2.TrainingJobSpec:
    """The job without whom it tells of itself."""
    public = job_pb2.TrainingJobSpec()
    public.CopyFrom(spec)
    public.ClearField("webhooks")
    return public


def _kind(job: job_pb2.TrainingJob) -> str:
    return job.spec.adapter.WhichOneof("kind") or "lokr"


def _base_model(job: job_pb2.TrainingJob) -> str:
    return BASE_MODELS.get(job.spec.model.flavour, BASE_MODELS["full"])


def _license(job: job_pb2.TrainingJob) -> str:
    return job.spec.publishing.license or BASE_LICENSE


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
