"""One job from lease to completion."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import diffusers
import grpc
from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceStub
from reverie.training.v1.training_pb2 import (
    WORKER_OUTCOME_FAILED,
    WORKER_OUTCOME_STOPPED,
    CompleteJobRequest,
)
from reverie.training.v1.training_pb2_grpc import WorkerServiceStub
from reverie_common.errors import ReverieError
from reverie_common.rpc.channel import connect
from reverie_common.storage import ObjectStore, get_object, open_store
from reverie_hidream.checkpoint import resolve_checkpoint
from reverie_hidream.training.draws import SampleDraws

from reverie_trainer.jobs.preparing.prompt_library import prompts_of
from reverie_trainer.worker import metrics
from reverie_trainer.worker.checkpoints import CheckpointSaver, SavedCheckpoint, read_state
from reverie_trainer.worker.choices import Chance
from reverie_trainer.worker.compute import choose_device
from reverie_trainer.worker.control_thread import ControlThread
from reverie_trainer.worker.data import BatchLoader, BatchMaker
from reverie_trainer.worker.engine import TrainingEngine, objective_settings
from reverie_trainer.worker.failures import failure_of
from reverie_trainer.worker.finish import Finisher
from reverie_trainer.worker.job import LeasedJob, read_job
from reverie_trainer.worker.measures import Measures
from reverie_trainer.worker.metrics_log import MetricsLog
from reverie_trainer.worker.model import ModelLoader, TrainedAdapter
from reverie_trainer.worker.on_demand import CaptionReader, EncoderAddresses, OnDemandCaptions, StoredCaptions
from reverie_trainer.worker.orders import Order, Orders
from reverie_trainer.worker.outbox import Outbox
from reverie_trainer.worker.pictures import Pictures
from reverie_trainer.worker.proof import probe
from reverie_trainer.worker.schedule import Schedule
from reverie_trainer.worker.settings import WorkerSettings
from reverie_trainer.worker.tensor_cache import TensorCache
from reverie_trainer.worker.trainer_link import LeaseLostError, ReportTiming, TrainerGoneError, TrainerLink
from reverie_trainer.worker.training import TrainingLoop
from reverie_trainer.worker.validation import ValidationQueue, ValidationTiming

if TYPE_CHECKING:
    from reverie.sampling.v1.sampling_pb2_grpc import SamplingServiceAsyncStub

logger = logging.getLogger(__name__)

EXIT_LEASE_LOST = 3
EXIT_TRAINER_GONE = 4


def run_worker(settings: WorkerSettings, *, job_id: str, token: str, orders: Orders) -> int:
    """Lease a job, train it, complete it; returns the exit status of the process. Blocks for all of it.

    Raises:
        Exception: whatever is worth another worker's try; the trainer starts one.
    """
    with ControlThread() as control:
        office = control.run(_open_office(settings, orders))
        try:
            return _Worker(settings=settings, control=control, store=open_store(settings), office=office).run(
                job_id=job_id, token=token
            )
        except LeaseLostError as error:
            logger.warning("the lease of %s is lost: %s", job_id, error)
            return EXIT_LEASE_LOST
        except TrainerGoneError as error:
            logger.error("%s", error)
            return EXIT_TRAINER_GONE
        finally:
            control.run(office.close())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Office:
    """Everything through which the worker talks to other services."""

    outbox: Outbox
    orders: Orders
    link: TrainerLink
    sampling: SamplingServiceAsyncStub | None
    channels: tuple[grpc.aio.Channel, ...]

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()


async def _open_office(settings: WorkerSettings, orders: Orders) -> _Office:
    # Both are waited for much longer than gRPC's own retries would.
    trainer = connect(settings.trainer, retries=False)
    sampler = connect(settings.sampler, retries=False) if settings.sampler else None
    outbox = Outbox()
    timing = ReportTiming(
        interval_seconds=settings.report_interval_seconds,
        heartbeat_seconds=2 * settings.report_interval_seconds,
        patience_seconds=settings.trainer_patience_seconds,
    )
    return _Office(
        outbox=outbox,
        orders=orders,
        link=TrainerLink(WorkerServiceStub(trainer), outbox=outbox, orders=orders, timing=timing),
        sampling=None if sampler is None else SamplingServiceStub(sampler),
        channels=(trainer,) if sampler is None else (trainer, sampler),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Worker:
    """A worker with its connections."""

    settings: WorkerSettings
    control: ControlThread
    store: ObjectStore
    office: _Office

    def run(self, *, job_id: str, token: str) -> int:
        worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        lease = self.control.run(self.office.link.lease(job_id=job_id, worker_id=worker_id, token=token))
        self.control.start(self.office.link.report())
        try:
            completion = self._work(read_job(self.store, lease))
        except Exception as error:
            # Process boundary: some errors end the job with their reason, all others end this worker.
            failure = failure_of(error)
            if failure is None or self.office.orders.current is Order.LEAVE:
                raise
            logger.exception("the job failed: %s", failure.message)
            completion = CompleteJobRequest(outcome=WORKER_OUTCOME_FAILED, failure=failure)
        return self._end(completion)

    def _end(self, completion: CompleteJobRequest) -> int:
        order = self.office.orders.current
        if order is Order.LEAVE:
            raise LeaseLostError(self.office.orders.why)
        if order is Order.DESERT:
            raise TrainerGoneError(self.office.orders.why)
        self.control.run(self.office.link.complete(completion))
        return 0

    def _work(self, job: LeasedJob) -> CompleteJobRequest:
        loader = ModelLoader(
            checkpoint=resolve_checkpoint(self.settings.checkpoint, store=self.store, parts=["transformer"]),
            device=choose_device(self.settings.device),
            job=job,
        )
        log = MetricsLog(self._metrics_so_far(job))
        if not job.begins_at_anothers:
            # What an earlier worker saved and was killed before it could report.
            for figures in log.after(job.last_reported_step):
                self.office.outbox.step(figures)
        with self._pictures(job) as pictures:
            trained = self._train(job, loader, log, pictures)
            if trained is None:
                return CompleteJobRequest(outcome=WORKER_OUTCOME_STOPPED)
            finisher = Finisher(job=job, store=self.store, outbox=self.office.outbox, models=loader)
            with self.office.outbox.timed("finish"):
                completion = finisher.finish(trained, log.body())
            pictures.drain(self.settings.validation_wait_seconds, lambda: self.office.orders.current is not Order.GO_ON)
            return completion

    def _metrics_so_far(self, job: LeasedJob) -> bytes:
        if job.checkpoint is None or job.takes_adapter_alone:
            return b""
        return get_object(self.store, job.checkpoint.metrics)

    def _train(self, job: LeasedJob, loader: ModelLoader, log: MetricsLog, pictures: Pictures) -> TrainedAdapter | None:
        """Train to the end; None if an order came first. Leaves nothing of the model in memory."""
        cache = TensorCache(self.store, max_bytes=self.settings.cache_bytes)
        with closing(self._captions(job, cache)) as captions:
            maker = BatchMaker(job.data, cache, _chance(job), _draws(job), captions)
            return self._train_on(maker, job, loader, log, pictures)

    def _train_on(
        self, maker: BatchMaker, job: LeasedJob, loader: ModelLoader, log: MetricsLog, pictures: Pictures
    ) -> TrainedAdapter | None:
        schedule = Schedule(
            job.data.schedule(job.spec),
            seed=job.spec.seed,
            batch_size=job.spec.optimization.batch_size,
            num_accumulated=job.spec.optimization.gradient_accumulation_steps,
            sampling=job.spec.dataset_sampling,
        )
        steps = range(job.first_step, job.spec.optimization.max_steps + 1)
        depth = self.settings.prefetch_batches
        # All batches of the window ask the encoders at the same time, where they ask at all.
        num_threads = depth if job.spec.embedding_storage == "on_demand" else self.settings.data_threads
        loading = BatchLoader(maker, schedule, steps=steps, depth=depth, num_threads=num_threads)
        # Data are read while the model is loaded.
        with loading as batches, self._saver(job) as saver:
            transformer, engine = self._load(job, loader)
            if job.checkpoint is not None:
                pictures.ask_again(job.checkpoint.scalars.get("pictures", ()))
            loop = TrainingLoop(
                job=job,
                engine=engine,
                batches=batches,
                saver=saver,
                pictures=pictures,
                measures=Measures(
                    choice=job.spec.evaluation,
                    datasets=job.data.evaluation_datasets,
                    max_steps=job.spec.optimization.max_steps,
                    clock=schedule.clock,
                    read_batches=maker.evaluation_batches,
                    outbox=self.office.outbox,
                ),
                clock=schedule.clock,
                log=log,
                outbox=self.office.outbox,
                orders=self.office.orders,
            )
            if loop.run() is not Order.GO_ON:
                return None
        batch = maker.make(schedule.micro_batches(1)[0])
        last_step = job.spec.optimization.max_steps
        with engine.weights():
            output = probe(transformer, batch)
        return TrainedAdapter(
            file=loop.adapter_file(last_step),
            ema_file=loop.adapter_file(last_step, "ema") if engine.has_ema else None,
            probe_batch=batch,
            output=output,
        )

    def _captions(self, job: LeasedJob, cache: TensorCache) -> CaptionReader:
        if job.spec.embedding_storage != "on_demand":
            return StoredCaptions(cache)
        encoders = EncoderAddresses(
            addresses=self.settings.encoders, patience_seconds=self.settings.encoder_patience_seconds
        )
        return OnDemandCaptions(
            encoders, job.data.encoders, cache=cache, control=self.control, outbox=self.office.outbox
        )

    def _load(
        self, job: LeasedJob, loader: ModelLoader
    ) -> tuple[diffusers.HiDreamImageTransformer2DModel, TrainingEngine]:
        """The model with its adapter, as an earlier worker left it if there was one."""
        with self.office.outbox.timed("load_model"):
            transformer = loader.load_base()
            adapter = loader.attach(transformer)
            self.office.outbox.adapter(num_modules=adapter.num_modules, num_parameters=adapter.num_parameters)
            engine = loader.engine(transformer, adapter)
            if job.checkpoint is not None:
                state = read_state(self.store, job.checkpoint)
                engine.load_state(state, adapter_only=job.takes_adapter_alone)
        return transformer, engine

    @contextmanager
    def _saver(self, job: LeasedJob) -> Iterator[CheckpointSaver]:
        saver = CheckpointSaver(
            self.store,
            job.job_id,
            keep=job.spec.checkpoints.keep,
            on_saved=self._report_saved,
            on_failed=self._report_unsaved,
        )
        try:
            yield saver
        finally:
            saver.close()

    def _report_saved(self, saved: SavedCheckpoint) -> None:
        metrics.CHECKPOINTS.labels("saved").inc()
        self.office.outbox.checkpoint(step=saved.step, adapter=saved.adapter, state=saved.state)

    def _report_unsaved(self, step: int, error: ReverieError) -> None:
        metrics.CHECKPOINTS.labels("failed").inc()
        self.office.outbox.warn(
            "CHECKPOINT_NOT_SAVED",
            f"the checkpoint at step {step} was not saved: {error.message}; training goes on and saves the next one",
        )

    @contextmanager
    def _pictures(self, job: LeasedJob) -> Iterator[Pictures]:
        queue = self._validation_queue(job)
        pictures = Pictures(
            job.spec.validation,
            queue,
            max_steps=job.spec.optimization.max_steps,
            store=self.store,
            control=self.control,
            outbox=self.office.outbox,
        )
        drawing = None if queue is None else self.control.start(queue.run())
        try:
            yield pictures
        finally:
            pictures.close()
            if drawing is not None:
                drawing.cancel()

    def _validation_queue(self, job: LeasedJob) -> ValidationQueue | None:
        if job.spec.validation is None or not prompts_of(job.spec.validation):
            return None
        if self.office.sampling is None:
            self.office.outbox.warn("NO_SAMPLER", "no pictures: the trainer was started without --sampler")
            return None
        timing = ValidationTiming(retry_seconds=self.settings.validation_retry_seconds)
        return self.control.run(_make_queue(self.office.sampling, job, self.office.outbox, timing))


async def _make_queue(
    stub: SamplingServiceAsyncStub, job: LeasedJob, outbox: Outbox, timing: ValidationTiming
) -> ValidationQueue | None:
    if job.spec.validation is None:
        return None
    return ValidationQueue(stub, job.spec.validation, outbox=outbox, timing=timing)


def _chance(job: LeasedJob) -> Chance:
    return Chance(
        seed=job.spec.seed,
        caption_dropout_probability=job.spec.optimization.caption_dropout_probability,
        sample_latents_once=job.spec.optimization.sample_latents_once,
    )


def _draws(job: LeasedJob) -> SampleDraws:
    return SampleDraws(
        seed=job.spec.seed,
        settings=objective_settings(job.spec.optimization),
        samples_per_step=job.spec.optimization.effective_batch,
    )
