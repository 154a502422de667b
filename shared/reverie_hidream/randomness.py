"""Random numbers as functions of (seed, stream, step, position), with no state to save or to lose (design 6).

Each draw starts its own Philox generator: the key comes from the seed and the name of the stream, the counter from step
and position. So a resumed job, or one on another number of devices, draws the same numbers in the same places.

Streams in use, each named for what it decides:

| stream          | step              | position                       | decides                                    |
|-----------------|-------------------|--------------------------------|--------------------------------------------|
| `order`         | epoch             | pass and group of samples      | order of the samples in a pass             |
| `buckets`       | epoch             | dataset                        | order of a dataset's batches in an epoch   |
| `datasets`      | epoch             | 0                              | which dataset gives each batch of an epoch |
| `caption`       | micro-step        | sample in the global batch     | which of several captions                  |
| `parts`         | micro-step        | sample in the global batch     | the order of the caption's parts           |
| `dropout`       | micro-step        | sample in the global batch     | whether the caption becomes the empty one  |
| `timestep`      | micro-step        | sample in the global batch     | the noise level                            |
| `noise`         | micro-step        | sample in the global batch     | the noise                                  |
| `offset`        | micro-step        | sample in the global batch     | offset noise of each channel               |
| `perturbation`  | micro-step        | sample in the global batch     | extra noise of the input                   |
| `slowing`       | micro-step        | sample in the global batch     | how much noisier mixflow's input is        |
| `mask`          | micro-step        | sample in the global batch     | whether a segmentation applies             |
| `rollout`       | micro-step        | sample in the global batch     | whether and how far a sample is rolled out |
| `posterior`     | micro-step (or 0) | sample in the batch (or image) | the draw from the VAE's posterior          |
| `adapter`       | 0                 | index of the module            | reserved for the adapter's start           |
| `rounding`      | optimiser step    | index of the parameter         | seed of the rounding of bfloat16 weights   |
| `evaluation/..` | 0                 | 0                              | noise of the image with this digest        |
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_UINT64 = 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One stream of random numbers; every method is a pure function of its arguments and of these fields."""

    seed: int
    """The job's seed, 0 or more."""
    stream: str
    """What the numbers decide; streams of different names are independent."""

    def normal(self, step: int, position: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """Standard normal numbers, float32, in `shape`."""
        return self.generator(step, position).standard_normal(tuple(shape), dtype=np.float32)

    def uniform(self, step: int, position: int) -> float:
        """One number in [0, 1)."""
        return float(self.generator(step, position).random())

    def integer(self, step: int, position: int, limit: int) -> int:
        """One whole number in [0, limit)."""
        return int(self.generator(step, position).integers(limit))

    def permutation(self, epoch: int, num_items: int, position: int = 0) -> npt.NDArray[np.int64]:
        """The numbers 0 to `num_items` - 1 in the order of this epoch."""
        return self.generator(epoch, position).permutation(num_items)

    def generator(self, step: int, position: int) -> np.random.Generator:
        """A generator at the start of the numbers of (step, position), 2**128 numbers before the next one's.

        Raises:
            ValueError: `step` or `position` is not in 0 .. 2**64 - 1.
        """
        for name, value in (("step", step), ("position", position)):
            if not 0 <= value < _UINT64:
                raise ValueError(f"{name} {value} is not in 0 .. 2**64 - 1")
        counter = np.array([0, 0, position, step], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=self._key(), counter=counter))

    def _key(self) -> npt.NDArray[np.uint64]:
        digest = hashlib.sha256(f"reverie/{self.seed}/{self.stream}".encode()).digest()
        return np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
