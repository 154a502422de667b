"""What a job would take: prompts, steps in an epoch, time. Memory and storage are in `resources`."""

import math
from collections.abc import Mapping, Sequence

from reverie.training.v1 import job_pb2
from sqlalchemy.orm import Session

from reverie_trainer.jobs.admission.admission import Admission
from reverie_trainer.jobs.preparing.buckets import EVALUATION, Bucket, scheduled_buckets, steps_per_epoch
from reverie_trainer.jobs.preparing.captions import captions_of
from reverie_trainer.jobs.spec import JobSpec, spec_from_proto
from reverie_trainer.jobs.state.records import job_message
from reverie_trainer.jobs.state.repository import list_jobs

_COMPARED_JOBS = 50


def count_prompts(admission: Admission) -> int:
    """Return the distinct prompts of a job, the empty one included."""
    prompts = {""}
    for choice in admission.spec.datasets:
        for sample in admission.manifests[choice.dataset].samples:
            prompts.update(captions_of(sample, choice))
    return len(prompts)


def epoch_steps(spec: JobSpec, num_images: Mapping[str, int], buckets: Sequence[Bucket] | None) -> int:
    """Return the optimiser steps in one epoch; without buckets, the least that it can be."""
    optimization = spec.optimization
    if buckets is not None:
        scheduled = scheduled_buckets(buckets, spec)
        return steps_per_epoch(scheduled, optimization.batch_size, optimization.gradient_accumulation_steps)
    trained = [choice for choice in spec.datasets if choice.role != EVALUATION]
    samples = sum(num_images[choice.dataset] * (choice.repeats + 1) for choice in trained)
    return math.ceil(math.ceil(samples / optimization.batch_size) / optimization.gradient_accumulation_steps)


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
