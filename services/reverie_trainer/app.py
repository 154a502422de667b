"""Puts the trainer together: what serves calls, what drives jobs, and the order in which they start and stop."""

import asyncio
from collections.abc import Mapping
from typing import Any

from reverie.training.v1 import training_pb2_grpc
from reverie_common.rpc.server import ServedService, Server
from reverie_common.storage import ObjectStore, open_store

from reverie_trainer.jobs.admission.adapter_selection import TransformerConfig
from reverie_trainer.jobs.admission.checkpoint_config import read_encoder_configs, read_transformer_config
from reverie_trainer.jobs.admission.encoder_requirements import EncoderRequirements
from reverie_trainer.jobs.admission.examination import Examiner
from reverie_trainer.jobs.admission.sampler_requirements import SamplerRequirements
from reverie_trainer.jobs.api.dataset_servicer import DatasetServicer
from reverie_trainer.jobs.api.training_servicer import TrainingServicer
from reverie_trainer.jobs.api.worker_servicer import WorkerServicer
from reverie_trainer.jobs.catalog.datasets import Datasets
from reverie_trainer.jobs.catalog.imports import Importer
from reverie_trainer.jobs.outlets import Dispatcher, OutletFactory
from reverie_trainer.jobs.outlets.hosts import AllowedHosts
from reverie_trainer.jobs.outlets.job_files import JobFiles
from reverie_trainer.jobs.outlets.named_secrets import Secrets
from reverie_trainer.jobs.preparing.inspection import ImageInspector
from reverie_trainer.jobs.preparing.preparation import Preparer
from reverie_trainer.jobs.preparing.services import EncoderClient, Services, VaeClient
from reverie_trainer.jobs.running.launcher import LocalLauncher, WorkerCommand
from reverie_trainer.jobs.running.reconciler import Reconciler, ReconcilerLimits
from reverie_trainer.jobs.state.changes import Changes
from reverie_trainer.jobs.state.database import Database, sqlite_url
from reverie_trainer.jobs.state.starts import Starts
from reverie_trainer.settings import TrainerSettings

_PACKAGE = "reverie.training.v1"

# Callers give up after 30 s, and an answer that names the store has to reach them before; preparation, which nobody
# waits for, has a patience of its own on top.
_STORE_RETRY_SECONDS = 5.0


class Trainer:
    """One trainer process."""

    def __init__(
        self,
        settings: TrainerSettings,
        store: ObjectStore,
        config: TransformerConfig,
        encoder_configs: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Starts nothing yet.

        Args:
            settings: where and how.
            store: the object store.
            config: the shape of the model that jobs train.
            encoder_configs: parsed `config.json` of the checkpoint's text encoders, by name.
        """
        self._settings = settings
        self._store = store
        self._database = Database(_database_url(settings), Changes())
        self._services = Services(
            encoders=tuple(EncoderClient(address) for address in settings.encoders), vae=VaeClient(settings.vae)
        )
        datasets = Datasets(self._database, store)
        self._reconciler = Reconciler(self._database, self._preparer(datasets, config), _limits(settings))
        outlets = _outlet_factory(settings, store, self._database)
        self._outlets = Dispatcher(self._database, outlets.make)
        self._sampler = SamplerRequirements(settings.sampler)
        starts = Starts(database=self._database, store=store)
        encoders = EncoderRequirements(self._services.encoders)
        further = [starts.check, outlets.check, encoders.check, self._sampler.check]
        examiner = Examiner(
            self._database, datasets, self._services, config, further, [self._sampler.notices], encoder_configs
        )
        self.server = Server(
            _served(
                TrainingServicer(self._database, store, examiner, starts),
                self._dataset_servicer(datasets),
                WorkerServicer(self._database, store, self._reconciler, settings.lease_seconds),
            ),
            settings,
            load=self._load,
            begin_drain=self._begin_drain,
            stop=self._stop,
        )

    def _preparer(self, datasets: Datasets, config: TransformerConfig) -> Preparer:
        return Preparer(
            services=self._services,
            datasets=datasets,
            store=self._store,
            max_pixels=config.max_pixels,
            patience_seconds=self._settings.patience_seconds,
            progress_seconds=self._settings.progress_seconds,
        )

    def _dataset_servicer(self, datasets: Datasets) -> DatasetServicer:
        importer = Importer(
            datasets=datasets,
            store=self._store,
            source_buckets=self._settings.source_buckets,
            source_hosts=self._settings.source_hosts,
        )
        inspector = ImageInspector(self._services.vae, self._settings.patience_seconds)
        return DatasetServicer(datasets, self._store, inspector, importer)

    async def _load(self) -> None:
        await asyncio.to_thread(self._store.check)
        await self._database.open()
        self._reconciler.start(LocalLauncher(self._worker_command()))
        self._outlets.start()

    async def _begin_drain(self) -> None:
        # While calls are still answered: workers complete their leases, and who watches is sent away to come back.
        await self._reconciler.stop()
        await self._outlets.stop()
        self._database.changes.close()

    async def _stop(self) -> None:
        await self._services.close()
        await self._sampler.close()
        await self._database.close()

    def _worker_command(self) -> WorkerCommand:
        settings = self._settings
        address = settings.trainer_address or f"{settings.host}:{self.server.port}"
        arguments = ["--trainer", address, "--sampler", settings.sampler, "--checkpoint", settings.checkpoint]
        arguments += ["--encoders", ",".join(settings.encoders)]
        arguments += ["--encoder-patience-seconds", f"{settings.patience_seconds:g}"]
        return WorkerCommand(
            arguments=arguments,
            environment=_store_environment(settings),
            log_dir=settings.state_dir / "workers",
            module=settings.worker_module,
            num_standby=settings.standby_workers,
        )


async def make_server(settings: TrainerSettings) -> Server:
    """Return the trainer's server, which listens to nothing yet.

    Raises:
        NotFoundError: the checkpoint has no transformer configuration.
    """
    retry_seconds = min(settings.store_retry_seconds, _STORE_RETRY_SECONDS)
    store = open_store(settings.model_copy(update={"store_retry_seconds": retry_seconds}))
    config = await asyncio.to_thread(read_transformer_config, settings.checkpoint, store)
    encoder_configs = await asyncio.to_thread(read_encoder_configs, settings.checkpoint, store)
    return Trainer(settings, store, config, encoder_configs).server


def _served(training: TrainingServicer, datasets: DatasetServicer, workers: WorkerServicer) -> list[ServedService]:
    return [
        ServedService(
            name=f"{_PACKAGE}.TrainingService",
            add_to_server=training_pb2_grpc.add_TrainingServiceServicer_to_server,
            servicer=training,
        ),
        ServedService(
            name=f"{_PACKAGE}.DatasetService",
            add_to_server=training_pb2_grpc.add_DatasetServiceServicer_to_server,
            servicer=datasets,
        ),
        ServedService(
            name=f"{_PACKAGE}.WorkerService",
            add_to_server=training_pb2_grpc.add_WorkerServiceServicer_to_server,
            servicer=workers,
        ),
    ]


def _database_url(settings: TrainerSettings) -> str:
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return sqlite_url(settings.state_dir)


def _outlet_factory(settings: TrainerSettings, store: ObjectStore, database: Database) -> OutletFactory:
    return OutletFactory(
        store=store,
        files=JobFiles(database=database),
        secrets=Secrets(directory=settings.secrets_dir),
        hosts=AllowedHosts(names=frozenset(host.lower() for host in settings.webhook_hosts)),
        directory=settings.tracking_dir or settings.state_dir / "tracking",
        hub_endpoint=settings.hub_endpoint,
    )


def _limits(settings: TrainerSettings) -> ReconcilerLimits:
    return ReconcilerLimits(
        max_concurrent_jobs=settings.max_concurrent_jobs,
        lease_seconds=settings.lease_seconds,
        start_seconds=settings.worker_start_seconds,
        stop_seconds=settings.worker_stop_seconds,
        max_starts_without_progress=settings.max_starts_without_progress,
        tick_seconds=settings.tick_seconds,
    )


def _store_environment(settings: TrainerSettings) -> dict[str, str]:
    """Return the store's settings as a worker reads them; secrets travel by environment only."""
    values = {
        "REVERIE_STORE_ENDPOINT": settings.store_endpoint,
        "REVERIE_STORE_BUCKET": settings.store_bucket,
        "REVERIE_STORE_REGION": settings.store_region,
        "REVERIE_STORE_ACCESS_KEY": settings.store_access_key.get_secret_value(),
        "REVERIE_STORE_SECRET_KEY": settings.store_secret_key.get_secret_value(),
        "REVERIE_STORE_PUBLIC_ENDPOINT": settings.store_public_endpoint or "",
        # A worker waits for the store as long as preparation does: a job must not fail for what a restart cures.
        "REVERIE_STORE_RETRY_SECONDS": str(max(settings.store_retry_seconds, settings.patience_seconds)),
    }
    return {name: value for name, value in values.items() if value}
