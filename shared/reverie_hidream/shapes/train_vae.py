"""The first part of the training: the VAE, on pictures of the world.

Its latents come out with mean 0 and deviation 1 after (z - shift) * scale, as those of the released VAE do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from reverie_hidream.ema import Ema, EmaSettings
from reverie_hidream.optimizers.schedules import learning_rate_at
from reverie_hidream.randomness import Draw
from reverie_hidream.shapes.architecture import SCALING_FACTOR, SHIFT_FACTOR, Architecture, build_vae
from reverie_hidream.shapes.drawing import draw_scene
from reverie_hidream.shapes.journal import Journal
from reverie_hidream.shapes.state import load_optimizer_tensors, load_state, optimizer_tensors, save_state
from reverie_hidream.shapes.world import PICTURE_SIZES, World

STATE_FILE = "vae.safetensors"
LOG_NAME = "vae"


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeSettings:
    """One run; the defaults are those of the checkpoint."""

    architecture: Architecture = field(default_factory=Architecture)
    seed: int = 0
    num_steps: int = 4000
    batch_size: int = 16
    """Pictures of 64 x 64 pixels in a batch; of larger ones as many as have the same area."""
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    divergence_weight: float = 5e-4
    """Of the divergence from a standard normal; more of it makes latents smoother and pictures coarser."""
    edge_weight: float = 1.0
    """Of the error of the differences between neighbouring pixels, which keeps edges and corners sharp."""
    moment_weight: float = 0.1
    """Of the distance of each channel's mean and variance from 0 and 1."""
    ema_decay: float = 0.998
    save_every: int = 500
    log_every: int = 20


class VaeTraining:
    """A run that can be interrupted after any step. Owned by one thread."""

    def __init__(self, directory: Path, settings: VaeSettings, *, device: str = "cpu") -> None:
        """Begin, or go on from the state in the directory.

        Raises:
            ValueError: the state there is of a run with other settings.
        """
        self._directory, self._settings, self._device = directory, settings, device
        self.model: AutoencoderKL = build_vae(settings.architecture, seed=settings.seed).to(device)
        self._parameters = dict(self.model.named_parameters())
        self._optimizer = torch.optim.AdamW(self._parameters.values(), weight_decay=1e-4, betas=(0.9, 0.99))
        self._ema = Ema(self._parameters, EmaSettings(decay=settings.ema_decay))
        self.step = 0
        self._resume()

    def run(self, *, until: int | None = None) -> None:
        """Train to the end or to a step, saving on the way. Blocks."""
        settings = self._settings
        last = min(settings.num_steps, until or settings.num_steps)
        journal = Journal(self._directory, LOG_NAME, step=self.step, num_steps=settings.num_steps)
        while self.step < last:
            figures = self._train_step(self.step + 1)
            self.step += 1
            if self.step % settings.log_every == 0 or self.step == last:
                journal.write(self.step, {name: float(value) for name, value in figures.items()})
            if self.step % settings.save_every == 0 or self.step == last:
                self.save()
                journal.plot()

    def save(self) -> None:
        """Write the state."""
        groups = {
            "model": {name: parameter.detach() for name, parameter in self._parameters.items()},
            "optimizer": optimizer_tensors(self._optimizer, self._parameters),
            "average": self._ema.state(),
        }
        save_state(self._directory / STATE_FILE, self.step, groups, _run(self._settings))

    def _resume(self) -> None:
        saved = load_state(self._directory / STATE_FILE, _run(self._settings))
        if saved is None:
            return
        self.model.load_state_dict(saved.groups["model"])
        load_optimizer_tensors(self._optimizer, self._parameters, saved.groups.get("optimizer", {}))
        self._ema.load_state(saved.groups["average"])
        self.step = saved.step

    def _train_step(self, step: int) -> dict[str, torch.Tensor]:
        settings = self._settings
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate_at(
                "cosine",
                step,
                learning_rate=settings.learning_rate,
                warmup_steps=settings.warmup_steps,
                max_steps=settings.num_steps,
                end=settings.learning_rate / 50,
            )
        losses = self._losses(step, self._batch(step))
        self._optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), 1.0)
        self._optimizer.step()
        self._ema.update(step)
        return {name: loss.detach() for name, loss in losses.items()}

    def _batch(self, step: int) -> torch.Tensor:
        """(B, 3, H, W) in -1 to 1; all of one size."""
        size = size_at(self._settings.seed, step)
        batch_size = max(1, self._settings.batch_size * 64 * 64 // (size[0] * size[1]))
        world = World(seed=self._settings.seed, picture_size=size)
        pictures = [draw_scene(world.training_scene(step * self._settings.batch_size + i)) for i in range(batch_size)]
        return to_pixels(pictures).to(self._device)

    def _losses(self, step: int, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        settings = self._settings
        posterior = self.model.encode(pixels).latent_dist
        mean = (posterior.mean - SHIFT_FACTOR) * SCALING_FACTOR
        deviation = posterior.std * SCALING_FACTOR
        noise = Draw(seed=settings.seed, stream="shapes/posterior").normal(step, 0, mean.shape)
        latents = mean + deviation * torch.from_numpy(noise).to(self._device)
        drawn = self.model.decode(latents / SCALING_FACTOR + SHIFT_FACTOR, return_dict=False)[0]
        picture, edges = functional.l1_loss(drawn, pixels), _edge_loss(drawn, pixels)
        divergence = 0.5 * (mean.square() + deviation.square() - 1.0 - 2.0 * deviation.log()).mean()
        moments = mean.mean(dim=(0, 2, 3)).square().mean() + (latents.var(dim=(0, 2, 3)) - 1.0).square().mean()
        loss = picture + settings.edge_weight * edges + settings.divergence_weight * divergence
        return {
            "loss": loss + settings.moment_weight * moments,
            "picture": picture,
            "edges": edges,
            "divergence": divergence,
            "noise": deviation.mean(),
            "moments": moments,
        }


def load_trained_vae(directory: Path, settings: VaeSettings) -> AutoencoderKL:
    """The averaged weights of a finished run, frozen, float32.

    Raises:
        FileNotFoundError: there is no state. ValueError: it is of other settings, or not finished.
    """
    path = directory / STATE_FILE
    saved = load_state(path, _run(settings))
    if saved is None:
        raise FileNotFoundError(f"{path} is missing; train the VAE first")
    if saved.step < settings.num_steps:
        raise ValueError(f"{path} is after step {saved.step} of {settings.num_steps}; go on with the VAE first")
    vae = build_vae(settings.architecture, seed=settings.seed)
    vae.load_state_dict(saved.groups["average"])
    frozen: AutoencoderKL = vae.requires_grad_(False).eval()
    return frozen


def size_at(seed: int, step: int) -> tuple[int, int]:
    """Width and height of the pictures of a step."""
    weights = list(PICTURE_SIZES.values())
    place = Draw(seed=seed, stream="shapes/size").integer(step, 0, sum(weights))
    sizes = [size for size, weight in PICTURE_SIZES.items() for _ in range(weight)]
    return sizes[place]


def to_pixels(pictures: list[Any]) -> torch.Tensor:
    """Pictures (H, W, 3) uint8 of one size as (B, 3, H, W) float32 in -1 to 1."""
    stacked = torch.stack([torch.from_numpy(picture) for picture in pictures])
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


def _edge_loss(drawn: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    difference = drawn - pixels
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def _run(settings: VaeSettings) -> Mapping[str, Any]:
    """What a resumed run must share; how often it saves and logs it may change."""
    chosen = asdict(settings)
    return {name: value for name, value in chosen.items() if name not in ("save_every", "log_every")}
