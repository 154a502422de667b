"""The training loop of one job, from its first step to its last."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from reverie.training.v1.job_pb2 import StepMetrics
from reverie_hidream.training.step import StepResult

from reverie_trainer.jobs.preparing.epochs import EpochClock
from reverie_trainer.worker import metrics
from reverie_trainer.worker.adapter_file import adapter_metadata
from reverie_trainer.worker.checkpoints import CheckpointContents, CheckpointSaver
from reverie_trainer.worker.data import BatchLoader
from reverie_trainer.worker.engine import TrainingEngine
from reverie_trainer.worker.job import LeasedJob
from reverie_trainer.worker.measures import Measures
from reverie_trainer.worker.metrics_log import MetricsLog
from reverie_trainer.worker.orders import Order, Orders
from reverie_trainer.worker.outbox import Outbox
from reverie_trainer.worker.pictures import Pictures

DRAWN_WEIGHTS = {"none": ("adapter",), "ema_only": ("ema",), "comparison": ("adapter", "ema")}
"""Of which weights pictures are drawn, by `ema.validation` (spec 7.3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLoop:
    """Trains a job with everything that it was given; owned by one thread."""

    job: LeasedJob
    engine: TrainingEngine
    batches: BatchLoader
    saver: CheckpointSaver
    pictures: Pictures
    measures: Measures
    clock: EpochClock
    log: MetricsLog
    outbox: Outbox
    orders: Orders

    def run(self) -> Order:
        """Train until the last step or until an order says otherwise; returns the order. Saves before it ends."""
        if self.job.first_step == 1:
            self.pictures.ask_base()
            self._measure_if_due(0)
        for step in range(self.job.first_step, self.job.spec.optimization.max_steps + 1):
            if not self.batches.wait_ready(self._goes_on) or not self._goes_on():
                return self._end_early(step - 1)
            self._train(step)
            is_asked = self.orders.take_picture_request()
            if is_asked or self.pictures.is_due(step, self.clock.crosses):
                self._ask_pictures(step)
            self._measure_if_due(step)
            if self._is_save_due(step):
                self._save(step)
        return self.orders.current

    def adapter_file(self, step: int, which: str = "adapter") -> bytes:
        """The adapter as it is after a step, or its running average; see `TrainingEngine.weights`."""
        return self.engine.export(adapter_metadata(self.job.spec, self.job.data, step), which)

    def _ask_pictures(self, step: int) -> None:
        for which in DRAWN_WEIGHTS[self.job.spec.ema.validation] if self.job.spec.ema else ("adapter",):
            self.pictures.ask(step, self.adapter_file(step, which), weights=which)

    def _measure_if_due(self, step: int) -> None:
        if not self.measures.is_due(step):
            return
        for which in ("adapter", "ema") if self.engine.has_ema and step else ("adapter",):
            self.measures.measure(step, partial(self.engine.evaluate, which=which), weights=which)

    def _train(self, step: int) -> None:
        begin, waited = time.monotonic(), self.batches.wait_seconds
        batches = self.batches.take(self.job.spec.optimization.gradient_accumulation_steps)
        result = self.engine.train_step(step, batches)
        self._record(step, result, time.monotonic() - begin, self.batches.wait_seconds - waited)

    def _record(self, step: int, result: StepResult, seconds: float, wait_seconds: float) -> None:
        figures = StepMetrics(
            step=step,
            loss=result.loss,
            learning_rate=result.learning_rate,
            gradient_norm=result.gradient_norm,
            step_seconds=seconds,
            data_wait_seconds=wait_seconds,
            gradient_absmax=result.gradient_absmax,
            load_balancing_loss=result.load_balancing_loss,
            regularisation_loss=result.regularisation_loss,
            expert_load=result.expert_load,
            router_entropy=result.router_entropy,
            rollout_share=result.rollout_share,
            epoch=self.clock.epoch_at(step),
        )
        self.log.add(figures)
        self.outbox.step(figures)
        self.outbox.phase("train", seconds)
        metrics.observe_step(figures)

    def _is_save_due(self, step: int) -> bool:
        checkpoints = self.job.spec.checkpoints
        is_end = step == self.job.spec.optimization.max_steps
        is_due = bool(checkpoints.every_steps and step % checkpoints.every_steps == 0)
        return is_end or is_due or self.clock.crosses(step, checkpoints.every_epochs)

    def _save(self, step: int) -> None:
        self.saver.save(
            CheckpointContents(
                step=step,
                adapter_file=self.adapter_file(step),
                state=self.engine.state(),
                metrics=self.log.body(),
                scalars={"pictures": self.pictures.pending()},
            )
        )

    def _goes_on(self) -> bool:
        return self.orders.current is Order.GO_ON

    def _end_early(self, last_step: int) -> Order:
        order = self.orders.current
        has_progress = last_step >= self.job.first_step
        if order is not Order.LEAVE and has_progress and not self._is_save_due(last_step):
            self._save(last_step)
        return order
