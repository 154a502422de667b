"""What chance decides about the data of one visit, by counter: the same on every run, resume and machine (design 6).

What it decides about the objective is in `reverie_hidream.training.draws`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from reverie_hidream.randomness import Draw

from reverie_trainer.worker.schedule import Visit

_ONCE = 0
"""Stands for the step where something is drawn once and not at each; steps count from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chance:
    """Which caption and which latent of a sample; every method is a pure function."""

    seed: int
    caption_dropout_probability: float = 0.0
    sample_latents_once: bool = False
    """Draw one latent for each image, as SimpleTuner does, and not one at each visit."""
    _streams: dict[str, Draw] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Name the streams."""
        names = ("caption", "dropout", "parts", "posterior")
        object.__setattr__(self, "_streams", {name: Draw(seed=self.seed, stream=name) for name in names})

    def caption(self, visit: Visit, num_orders: Sequence[int]) -> tuple[int, int] | None:
        """Index of the caption to use, and of the order of its parts; None is the empty one.

        Args:
            num_orders: of each caption, 1 where its parts are not shuffled.
        """
        if self._streams["dropout"].uniform(visit.step, visit.position) < self.caption_dropout_probability:
            return None
        caption = self._one_of("caption", visit, len(num_orders))
        return caption, self._one_of("parts", visit, num_orders[caption])

    def posterior(self, visit: Visit, image_sha256: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Standard normal numbers that pick a latent from the posterior."""
        if self.sample_latents_once:
            # By the image and not by its place in the manifest: other images come and go.
            return self._streams["posterior"].normal(_ONCE, int(image_sha256[:15], 16), shape)
        return self._streams["posterior"].normal(visit.step, visit.position, shape)

    def _one_of(self, stream: str, visit: Visit, limit: int) -> int:
        return 0 if limit == 1 else self._streams[stream].integer(visit.step, visit.position, limit)
