"""The batches of a job, read from the store and put together ahead of their use."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from types import TracebackType
from typing import Self

import torch
from reverie_hidream.conditioning import collate
from reverie_hidream.training.batch import Batch
from reverie_hidream.training.draws import SampleDraws
from reverie_hidream.training.evaluation import EvaluationBatch, evaluation_noise

from reverie_trainer.worker.choices import Chance
from reverie_trainer.worker.on_demand import CaptionReader, StoredCaptions
from reverie_trainer.worker.samples import Caption, PreparedData
from reverie_trainer.worker.schedule import Schedule, Visit
from reverie_trainer.worker.tensor_cache import TensorCache

_GO_ON_SECONDS = 0.5


class BatchMaker:
    """Puts batches together; a pure function of the visits, apart from the cache. Thread-safe."""

    def __init__(
        self,
        data: PreparedData,
        cache: TensorCache,
        chance: Chance,
        draws: SampleDraws,
        captions: CaptionReader | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            captions: where embeddings come from; None is the store.
            chance: which caption and which latent of a sample.
            draws: what the objective leaves to chance.
        """
        self._data = data
        self._cache = cache
        self._chance = chance
        self._draws = draws
        self._captions = captions or StoredCaptions(cache)

    def cancel(self) -> None:
        """End what waits for an encoder now, with concurrent.futures.CancelledError."""
        self._captions.cancel()

    def make(self, visits: Sequence[Visit]) -> Batch:
        """Read what the batch needs and put it together. Blocks.

        Raises:
            ReverieError: the store is away, or something is missing from it.
        """
        latents = torch.stack([self._latent(visit) for visit in visits])
        positions = [visit.position for visit in visits]
        # A batch never mixes sources.
        source = self._data.sources[self._data.samples[visits[0].sample].source]
        return Batch(
            latents=latents,
            draws=self._draws.draw(
                visits[0].step,
                positions,
                tuple(latents.shape[1:]),
                timestep_offset=source.timestep_sampling_offset,
            ),
            conditioning=collate(self._captions.read([self._caption(visit) for visit in visits])),
            masks=None if source.mask_type == "none" else self._masks(visits, latents),
            mask_type="mask" if source.mask_type == "none" else source.mask_type,
            is_regularisation=source.is_regularisation,
        )

    def evaluation_batches(self, dataset: str, num_images: int) -> Iterator[EvaluationBatch]:
        """Yield the first images of an evaluation dataset by name, one at a time: the same every time. Blocks.

        The latent is the posterior's mean, the noise depends on the image alone, the caption is the first one.

        Raises:
            ReverieError: the store is away, or something is missing from it.
        """
        for index in self._data.evaluation_samples(dataset)[:num_images]:
            sample = self._data.samples[index]
            mean, _ = self._cache.get(sample.latents)
            yield EvaluationBatch(
                latents=mean[None].clone(),
                noise=evaluation_noise(sample.image_sha256, tuple(mean.shape))[None],
                conditioning=collate(self._captions.read([sample.captions[0][0]])),
            )

    def _latent(self, visit: Visit) -> torch.Tensor:
        sample = self._data.samples[visit.sample]
        mean, deviation = self._cache.get(sample.latents)
        draw = torch.from_numpy(self._chance.posterior(visit, sample.image_sha256, tuple(mean.shape)))
        return torch.addcmul(mean, deviation, draw)

    def _masks(self, visits: Sequence[Visit], latents: torch.Tensor) -> torch.Tensor | None:
        """(B, 1, h, w); None where no sample of the batch has one. A sample without one counts as a whole."""
        refs = [self._data.samples[visit.sample].mask for visit in visits]
        if not any(refs):
            return None
        whole = torch.ones(1, *latents.shape[2:])
        return torch.stack([whole if ref is None else self._cache.get(ref) for ref in refs])

    def _caption(self, visit: Visit) -> Caption:
        captions = self._data.samples[visit.sample].captions
        choice = self._chance.caption(visit, [len(orders) for orders in captions])
        return self._data.empty_caption if choice is None else captions[choice[0]][choice[1]]


class BatchLoader:
    """The batches from one step on, in order; made by background threads before they are asked for.

    A context manager. `depth` micro-batches are made or being made at any time, which bounds the memory.
    """

    def __init__(self, maker: BatchMaker, schedule: Schedule, *, steps: range, depth: int, num_threads: int) -> None:
        """Begin to read.

        Args:
            steps: optimiser steps to make batches for.
            depth: micro-batches to be ahead.
            num_threads: batches that are made at the same time.
        """
        self._maker = maker
        self._depth = depth
        self._pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="data")
        self._visits = (visits for step in steps for visits in schedule.micro_batches(step))
        self._ahead: deque[Future[Batch]] = deque()
        self.wait_seconds = 0.0
        self._fill()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop reading."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._maker.cancel()
        self._pool.shutdown(wait=True)

    def wait_ready(self, go_on: Callable[[], bool]) -> bool:
        """Wait until the next batch is made or cannot be made; False when `go_on` says no before that.

        A batch may wait for a store or an encoder that is away, for as long as their patience.
        """
        begin = time.monotonic()
        while not self._ahead[0].done() and go_on():
            wait([self._ahead[0]], timeout=_GO_ON_SECONDS)
        self.wait_seconds += time.monotonic() - begin
        return self._ahead[0].done()

    def take(self, num_batches: int) -> Iterator[Batch]:
        """Yield the next batches; what waiting for them took is added to `wait_seconds`.

        Raises:
            ReverieError: the store is away, or something is missing from it.
        """
        for _ in range(num_batches):
            begin = time.monotonic()
            batch = self._ahead.popleft().result()
            self.wait_seconds += time.monotonic() - begin
            self._fill()
            yield batch

    def _fill(self) -> None:
        for visits in islice(self._visits, self._depth - len(self._ahead)):
            self._ahead.append(self._pool.submit(self._maker.make, visits))
