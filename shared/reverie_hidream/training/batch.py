"""One micro-batch as it comes from the host: what is trained on, and every number that chance decides about it.

B batch, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reverie_hidream.conditioning import TextConditioning


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchDraws:
    """What chance decides for the samples of one micro-batch; see `SampleDraws`."""

    noise: torch.Tensor
    """(B, C, h, w) float32: standard normal, plus the offset of each channel where there is offset noise."""
    sigmas: torch.Tensor
    """(B,) float32: noise levels in [0, 1], after the shift."""
    input_sigmas: torch.Tensor | None = None
    """(B,) float32: noise levels of the input where they are not those that the network is told (mixflow)."""
    perturbation: torch.Tensor | None = None
    """(B, C, h, w) float32: added to the noise of the input alone, already at its strength."""
    rollout_offsets: tuple[int, ...] = ()
    """Steps of the inference schedule that each sample is rolled out for; empty where no sample is."""
    uses_mask: tuple[bool, ...] = ()
    """Which samples' segmentations apply; empty is all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch, on the CPU. All samples are of one dataset and of one size."""

    latents: torch.Tensor
    """(B, C, h, w) float32, scaled; drawn from the posterior."""
    draws: BatchDraws
    conditioning: TextConditioning
    masks: torch.Tensor | None = None
    """(B, 1, h, w) float32, 0 to 1: what weighs the loss; None weighs every pixel alike."""
    mask_type: str = "mask"
    """`mask` takes the masks as weights, `segmentation` makes everything above 0 a 1 (spec 3.6)."""
    is_regularisation: bool = False
    """Train towards the prediction of the model without its adapter, not towards the images (spec 3.7)."""

    def __post_init__(self) -> None:
        """Refuse a batch whose parts do not belong together."""
        latents, draws = self.latents, self.draws
        batch_size = latents.shape[0]
        if draws.noise.shape != latents.shape:
            raise ValueError(f"latents {tuple(latents.shape)} need such noise; got {tuple(draws.noise.shape)}")
        if draws.sigmas.shape != (batch_size,) or self.conditioning.batch_size != batch_size:
            raise ValueError(
                f"{batch_size} latents need as many noise levels and prompts; "
                f"got {tuple(draws.sigmas.shape)} and {self.conditioning.batch_size}"
            )
        expected = (batch_size, 1, *latents.shape[2:])
        if self.masks is not None and self.masks.shape != expected:
            raise ValueError(f"masks of {tuple(self.masks.shape)} do not suit the latents; expected {expected}")

    @property
    def noise(self) -> torch.Tensor:
        """(B, C, h, w) float32: what the target is made of."""
        return self.draws.noise

    @property
    def rolled_out(self) -> list[int]:
        """Places of the samples that are rolled out; regularisation samples never are."""
        if self.is_regularisation:
            return []
        return [place for place, offset in enumerate(self.draws.rollout_offsets) if offset]

    @property
    def num_samples(self) -> int:
        """Samples in the batch."""
        return self.latents.shape[0]
