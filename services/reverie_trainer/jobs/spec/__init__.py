"""What a training job asks for: the domain form of `TrainingJobSpec`, with every default of the contract filled in.

Whether the values make sense is decided in `checks`; here they are only carried.
"""

from reverie_trainer.jobs.spec.adapter import (
    Adapter,
    FullRank,
    LokrAdapter,
    LokrOverrides,
    LokrPreset,
    LoraAdapter,
    LycorisAdapter,
)
from reverie_trainer.jobs.spec.data import CropAspect, DatasetChoice
from reverie_trainer.jobs.spec.job import Checkpoints, JobSpec, Start, spec_from_proto, spec_to_proto
from reverie_trainer.jobs.spec.measures import Ema, Evaluation
from reverie_trainer.jobs.spec.model import Memory, ModelChoice
from reverie_trainer.jobs.spec.optimization import (
    Optimization,
    Reflexflow,
    ScheduledSampling,
)
from reverie_trainer.jobs.spec.outlets import Publishing, Tracking, Webhook
from reverie_trainer.jobs.spec.validation import Validation, ValidationPrompt

__all__ = [
    "Adapter",
    "Checkpoints",
    "CropAspect",
    "DatasetChoice",
    "Ema",
    "Evaluation",
    "FullRank",
    "JobSpec",
    "LokrAdapter",
    "LokrOverrides",
    "LokrPreset",
    "LoraAdapter",
    "LycorisAdapter",
    "Memory",
    "ModelChoice",
    "Optimization",
    "Publishing",
    "Reflexflow",
    "ScheduledSampling",
    "Start",
    "Tracking",
    "Validation",
    "ValidationPrompt",
    "Webhook",
    "spec_from_proto",
    "spec_to_proto",
]
