"""What a job would take: steps in an epoch, bytes in the store, memory of a worker, time."""

import math
from collections.abc import Iterable, Mapping, Sequence

from reverie.encoder.v1 import encoder_pb2
from reverie.training.v1 import job_pb2
from sqlalchemy.orm import Session

from reverie_trainer.jobs.adapter_selection import AdapterSelection, TransformerConfig, num_transformer_parameters
from reverie_trainer.jobs.admission import Admission
from reverie_trainer.jobs.buckets import EVALUATION, Bucket, scheduled_buckets, steps_per_epoch
from reverie_trainer.jobs.captions import captions_of
from reverie_trainer.jobs.records import job_message
from reverie_trainer.jobs.repository import list_jobs
from reverie_trainer.jobs.spec import JobSpec, spec_from_proto

_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1}

# mean and std, 16 channels each, 8 x 8 pixels to a latent pixel, float32 (spec 1.3).
_LATENT_BYTES_PER_PIXEL = 2 * 16 * 4 / 64

_TEXT_TOKENS = 384

# The accelerator's context and what is lost between tensors (spec 10.2).
_RUNTIME_BYTES = 1_000_000_000

_COMPARED_JOBS = 50


def count_prompts(admission: Admission) -> int:
    """Return the distinct prompts of a job, the empty one included."""
    prompts = {""}
    for choice in admission.spec.datasets:
        for sample in admission.manifests[choice.dataset].samples:
            prompts.update(captions_of(sample, choice))
    return len(prompts)


def storage_bytes(num_prompts: int, descriptions: Iterable[encoder_pb2.EncoderDescription], pixels: int) -> int:
    """Return the bytes of embeddings and latents, before compression and before sharing (spec 6.4).

    `pixels` is the sum over all images, after their crops.
    """
    text = sum(math.prod(item.shape) * _DTYPE_BYTES.get(item.dtype, 4) for item in descriptions)
    return num_prompts * text + int(pixels * _LATENT_BYTES_PER_PIXEL)


def epoch_steps(spec: JobSpec, num_images: Mapping[str, int], buckets: Sequence[Bucket] | None) -> int:
    """Return the optimiser steps in one epoch; without buckets, the least that it can be."""
    optimization = spec.optimization
    if buckets is not None:
        scheduled = scheduled_buckets(buckets, spec)
        return steps_per_epoch(scheduled, optimization.batch_size, optimization.gradient_accumulation_steps)
    trained = [choice for choice in spec.datasets if choice.role != EVALUATION]
    samples = sum(num_images[choice.dataset] * (choice.repeats + 1) for choice in trained)
    return math.ceil(math.ceil(samples / optimization.batch_size) / optimization.gradient_accumulation_steps)


def worker_memory_bytes(spec: JobSpec, config: TransformerConfig, selection: AdapterSelection) -> int:
    """Return an estimate of the accelerator memory that a worker needs, along the budget of spec 10.2."""
    compute_bytes = 2 if spec.model.mixed_precision == "bf16" else 4
    weight_bytes = 1 if spec.model.base_precision == "int8-quanto" else compute_bytes
    weights = num_transformer_parameters(config) * weight_bytes
    # Adapter, gradient and optimiser state in float32: AdamW keeps two moments, Lion one.
    copies = 4 if spec.optimization.optimizer == "adamw" else 3
    adapter = selection.num_parameters * 4 * copies
    num_blocks = config.num_layers + config.num_single_layers
    tokens = config.max_image_tokens + _TEXT_TOKENS
    stream = spec.optimization.batch_size * tokens * config.width * compute_bytes
    # With checkpointing one input a block and one block's activations; without, about 34 of them for every block.
    kept = num_blocks + 34 if spec.optimization.gradient_checkpointing else num_blocks * 34
    largest_linear = 12 * config.width * config.width * compute_bytes
    return weights + adapter + kept * stream + 2 * largest_linear + _RUNTIME_BYTES


def seconds_per_step(session: Session, spec: JobSpec) -> float | None:
    """Return the seconds that a step took in the newest comparable job, None when there is none."""
    for row in list_jobs(session, (), None, _COMPARED_JOBS):
        job = job_message(row)
        if job.step and _is_comparable(spec, spec_from_proto(job.spec)):
            seconds = _training_seconds(job)
            if seconds is not None:
                return seconds
    return None


def _training_seconds(job: job_pb2.TrainingJob) -> float | None:
    phases = {phase.name: phase.seconds for phase in job.phases}
    if phases.get("train"):
        return phases["train"] / job.step
    return job.metrics.step_seconds if job.HasField("metrics") and job.metrics.step_seconds > 0 else None


def _is_comparable(one: JobSpec, other: JobSpec) -> bool:
    return _pace(one) == _pace(other)


def _pace(spec: JobSpec) -> tuple[object, ...]:
    """What the time of a step mostly depends on."""
    return (
        spec.model.base_precision,
        spec.model.mixed_precision,
        spec.optimization.batch_size,
        spec.optimization.gradient_accumulation_steps,
        spec.optimization.gradient_checkpointing,
        sorted({choice.resolution for choice in spec.datasets}),
    )
