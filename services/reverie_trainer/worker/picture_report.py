"""Telling the trainer of the pictures of one round, each once, however often it is answered."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from reverie.sampling.v1.sampling_pb2 import SampledImage, SampleRequest, SampleResponse, SamplingPreview
from reverie.training.v1.job_pb2 import ValidationImage, ValidationPreview, ValidationScores

from reverie_trainer.worker.outbox import Outbox


@dataclass(kw_only=True, slots=True)
class PictureReport:
    """What is known of one round."""

    outbox: Outbox
    step: int
    weights: str
    num_total: int
    _seen: set[tuple[object, ...]] = field(default_factory=set)
    _scores: list[float] = field(default_factory=list)
    _num_done: int = 0

    def add(self, prompt_name: str, request: SampleRequest, response: SampleResponse) -> None:
        """Report what one response carries: a picture or a preview."""
        if response.HasField("image"):
            self._add_image(prompt_name, response.image)
        elif response.HasField("preview"):
            self._add_preview(prompt_name, request, response.preview)

    def finish(self) -> None:
        """Report the scores of the round, where there are any."""
        if not self._scores:
            return
        self.outbox.scores(
            ValidationScores(
                step=self.step,
                weights=self.weights,
                num_pictures=len(self._scores),
                mean=statistics.fmean(self._scores),
                min=min(self._scores),
                max=max(self._scores),
                std=statistics.pstdev(self._scores),
            )
        )

    def _add_image(self, prompt_name: str, image: SampledImage) -> None:
        if not self._is_new(prompt_name, image.width, image.height, image.image_index):
            return
        has_score = image.HasField("clip_score")
        if has_score:
            self._scores.append(image.clip_score)
        self.outbox.image(
            ValidationImage(
                step=self.step,
                prompt_name=prompt_name,
                image_index=image.image_index,
                width=image.width,
                height=image.height,
                image=image.image,
                weights=self.weights,
                clip_score=image.clip_score if has_score else None,
            )
        )
        self._num_done += 1
        self.outbox.validation_progress(step=self.step, num_done=self._num_done, num_total=self.num_total)

    def _add_preview(self, prompt_name: str, request: SampleRequest, preview: SamplingPreview) -> None:
        if not self._is_new(prompt_name, request.width, request.height, preview.image_index, preview.step):
            return
        self.outbox.preview(
            ValidationPreview(
                step=self.step,
                prompt_name=prompt_name,
                image_index=preview.image_index,
                width=request.width,
                height=request.height,
                sampling_step=preview.step,
                num_sampling_steps=preview.num_steps,
                timestep=preview.timestep,
                image=preview.image,
            )
        )

    def _is_new(self, *identity: object) -> bool:
        if identity in self._seen:
            return False
        self._seen.add(identity)
        return True
