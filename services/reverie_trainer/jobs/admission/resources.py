"""What a job needs: accelerator memory for worker and encoders, room in the store; each with its parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reverie.encoder.v1 import encoder_pb2
from reverie.training.v1 import job_pb2
from reverie_hidream.precisions import INT8_QUANTO, NO_CHANGE

from reverie_trainer.jobs.admission.adapter_selection import AdapterSelection, TransformerConfig
from reverie_trainer.jobs.admission.encoder_estimate import encoder_memory
from reverie_trainer.jobs.admission.memory_estimate import largest_batch, total_bytes, worker_memory
from reverie_trainer.jobs.admission.storage_estimate import storage_parts, storage_totals
from reverie_trainer.jobs.checks.storage import EMBEDDING_STORAGES
from reverie_trainer.jobs.preparing.buckets import Bucket, trained
from reverie_trainer.jobs.preparing.services import ENCODER_NAMES
from reverie_trainer.jobs.spec import FullRank, JobSpec

_WORTH_A_HINT = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What is known of a job's data and services when it is checked."""

    spec: JobSpec
    selection: AdapterSelection
    buckets: Sequence[Bucket] | None
    """None where the images could not be opened."""
    num_prompts: int
    num_pixels: int
    encoders: Sequence[encoder_pb2.EncoderDescription]
    """Of the services that answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Counts what jobs need of one checkpoint."""

    config: TransformerConfig
    encoder_configs: Mapping[str, Mapping[str, Any]]
    """Parsed `config.json` of each text encoder that the checkpoint has, by name."""

    def estimate(self, demand: Demand) -> job_pb2.JobEstimate:
        """Return the sizes of an estimate, with their parts."""
        memory = self._worker_memory(demand, demand.spec)
        storages = {name: self._storage(demand, name) for name in EMBEDDING_STORAGES}
        own = storages[demand.spec.embedding_storage]
        return job_pb2.JobEstimate(
            storage_bytes=total_bytes(own),
            worker_memory_bytes=total_bytes(memory),
            worker_memory=memory,
            encoder_memory=self._encoder_memory(demand),
            storage=storage_totals(storages),
            storage_parts=own,
        )

    def hints(self, demand: Demand) -> list[str]:
        """Return what would make the job smaller, a line each."""
        model = demand.spec.model
        if model.base_precision != NO_CHANGE or isinstance(demand.spec.adapter, FullRank):
            return []
        smaller = replace(demand.spec, model=replace(model, base_precision=INT8_QUANTO))
        now, then = (total_bytes(self._worker_memory(demand, spec)) for spec in (demand.spec, smaller))
        if then > _WORTH_A_HINT * now:
            return []
        return [f"with model.base_precision {INT8_QUANTO} the worker needs {then / 1e9:.1f} GB of memory"]

    def _worker_memory(self, demand: Demand, spec: JobSpec) -> list[job_pb2.EstimatePart]:
        sizes = None
        if demand.buckets is not None:
            sizes = [(bucket.width, bucket.height) for bucket in trained(demand.buckets)]
        return worker_memory(spec, self.config, demand.selection, largest_batch(spec, self.config, sizes))

    def _storage(self, demand: Demand, storage: str) -> list[job_pb2.EstimatePart]:
        is_float32 = any(item.dtype == "F32" for item in demand.encoders)
        return storage_parts(
            storage,
            self.config,
            num_prompts=demand.num_prompts,
            num_pixels=demand.num_pixels,
            value_bytes=4 if is_float32 else 2,
        )

    def _encoder_memory(self, demand: Demand) -> list[job_pb2.EstimatePart]:
        described = {ENCODER_NAMES[item.encoder]: item for item in demand.encoders if item.encoder in ENCODER_NAMES}
        precisions = {name: item.precision or NO_CHANGE for name, item in described.items()}
        # What the job demands comes before what a service says: it would be refused otherwise.
        precisions.update(demand.spec.model.text_encoder_precision)
        dtypes = {name: item.dtype for name, item in described.items()}
        return encoder_memory(self.encoder_configs, precisions, dtypes)
