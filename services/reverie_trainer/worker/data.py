"""The batches of a job, read from the store and put together ahead of their use.

B batch, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

import torch
from reverie_hidream.conditioning import TextConditioning, collate

from reverie_trainer.worker.choices import Chance
from reverie_trainer.worker.samples import Embeddings, PreparedData
from reverie_trainer.worker.schedule import Schedule, Visit
from reverie_trainer.worker.tensor_cache import TensorCache


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch, on the CPU."""

    latents: torch.Tensor
    """(B, C, h, w) float32, scaled; drawn from the posterior."""
    noise: torch.Tensor
    """(B, C, h, w) float32, standard normal."""
    timestep_draws: torch.Tensor
    """(B,) float32, standard normal: what the noise levels are made of."""
    conditioning: TextConditioning


class BatchMaker:
    """Puts batches together; a pure function of the visits, apart from the cache. Thread-safe."""

    def __init__(self, data: PreparedData, cache: TensorCache, chance: Chance) -> None:
        """Nothing is read yet."""
        self._data = data
        self._cache = cache
        self._chance = chance

    def make(self, visits: Sequence[Visit]) -> Batch:
        """Read what the batch needs and put it together. Blocks.

        Raises:
            ReverieError: the store is away, or something is missing from it.
        """
        latents = [self._latent(visit) for visit in visits]
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack(
                [torch.from_numpy(self._chance.noise(visit, tuple(latents[0].shape))) for visit in visits]
            ),
            timestep_draws=torch.tensor([self._chance.timestep(visit) for visit in visits], dtype=torch.float32),
            conditioning=collate([self._embeddings(visit) for visit in visits]),
        )

    def _latent(self, visit: Visit) -> torch.Tensor:
        sample = self._data.samples[visit.sample]
        mean, deviation = self._cache.get(sample.latents)
        draw = torch.from_numpy(self._chance.posterior(visit, sample.image_sha256, tuple(mean.shape)))
        return torch.addcmul(mean, deviation, draw)

    def _embeddings(self, visit: Visit) -> dict[str, torch.Tensor]:
        captions = self._data.samples[visit.sample].captions
        choice = self._chance.caption(visit, len(captions))
        refs: Embeddings = self._data.empty_caption if choice is None else captions[choice]
        return {name: self._cache.get(ref) for name, ref in refs.items()}


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
        self._pool.shutdown(wait=True, cancel_futures=True)

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
