"""The end of a successful training: prove the exported adapter, and put everything for people into the store."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

from reverie.common.v1.common_pb2 import ObjectRef
from reverie.training.v1.training_pb2 import WORKER_OUTCOME_SUCCEEDED, CompleteJobRequest
from reverie_common.storage import JSON_MEDIA_TYPE, OBJECT_MEDIA_TYPE, ObjectStore, put_object
from reverie_common.storage.keys import artifact_key

from reverie_trainer.jobs.state.artifacts import adapter_path, ema_adapter_path
from reverie_trainer.worker.adapter_file import lycoris_config_file
from reverie_trainer.worker.job import LeasedJob
from reverie_trainer.worker.model import ModelLoader, TrainedAdapter
from reverie_trainer.worker.outbox import Outbox
from reverie_trainer.worker.proof import prove_export

logger = logging.getLogger(__name__)

CONFIG_NAME = "adapter/lycoris_config.json"
METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finisher:
    """Turns a trained adapter into the job's results."""

    job: LeasedJob
    store: ObjectStore
    outbox: Outbox
    models: ModelLoader

    def finish(self, trained: TrainedAdapter, metrics_file: bytes) -> CompleteJobRequest:
        """Prove the adapter and write the results. Blocks; the trained model must be out of memory by now.

        Raises:
            ExportRefutedError: the exported file is not what was trained.
            ReverieError: the store is away, full or refuses us.
        """
        proof = prove_export(
            trained.file,
            trained_output=trained.output,
            load_base=self.models.load_base,
            batch=trained.probe_batch,
        )
        self.outbox.inform(
            "ADAPTER_PROVEN",
            f"loaded into a fresh model, the exported adapter changes its output by {proof.change:.2%} and differs "
            f"from the trained one by {proof.difference:.1e} (limit {proof.tolerance:.0e}); it changes the picture of "
            f"a fixed prompt by {proof.picture_change:.2%}",
        )
        completion = CompleteJobRequest(
            outcome=WORKER_OUTCOME_SUCCEEDED,
            adapter=self._put(adapter_path(self.job.adapter), trained.file, OBJECT_MEDIA_TYPE),
            metrics=self._put(METRICS_NAME, metrics_file, "application/jsonl"),
        )
        lycoris_config = lycoris_config_file(self.job.adapter)
        if lycoris_config is not None:
            completion.lycoris_config.CopyFrom(self._put(CONFIG_NAME, lycoris_config, JSON_MEDIA_TYPE))
        if trained.ema_file is not None:
            completion.ema_adapter.CopyFrom(
                self._put(ema_adapter_path(self.job.adapter), trained.ema_file, OBJECT_MEDIA_TYPE)
            )
        return completion

    def _put(self, name: str, body: bytes, media_type: str) -> ObjectRef:
        key = artifact_key(self.job.job_id, name, hashlib.sha256(body).hexdigest())
        return put_object(self.store, key, body, media_type)
