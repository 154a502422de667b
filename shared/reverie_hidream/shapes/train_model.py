"""The second part of the training: the transformer with its experts, and the text encoders with it or frozen.

The objective is the project's own: its draws, its noisy latents, its loss and its load-balancing loss.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.ema import Ema, EmaSettings
from reverie_hidream.flow import noisy_latents, timesteps_of, velocity_target
from reverie_hidream.moe import RouterUse, load_balancing_loss
from reverie_hidream.optimizers.schedules import learning_rate_at
from reverie_hidream.randomness import Draw
from reverie_hidream.shapes.architecture import Architecture, build_encoders, build_transformer, save_checkpoint
from reverie_hidream.shapes.captions import training_caption
from reverie_hidream.shapes.encoding import encode_captions
from reverie_hidream.shapes.journal import Journal
from reverie_hidream.shapes.latents import LatentPool
from reverie_hidream.shapes.state import load_optimizer_tensors, load_state, optimizer_tensors, save_state
from reverie_hidream.shapes.train_vae import size_at
from reverie_hidream.shapes.world import World
from reverie_hidream.training.batch import Batch
from reverie_hidream.training.draws import SampleDraws
from reverie_hidream.training.objective import ObjectiveSettings, mean_losses, pixel_losses
from reverie_hidream.transformer import predict_velocity

STATE_FILE = "model.safetensors"
LOG_NAME = "model"
_TEXT_TOKENS = 60
_PATCH_PIXELS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """One run; the defaults are those of the checkpoint."""

    architecture: Architecture = field(default_factory=Architecture)
    seed: int = 0
    num_steps: int = 9000
    batch_size: int = 64
    """Pictures of 64 x 64 pixels in a batch; of larger ones as many as have the same number of tokens."""
    num_scenes: int = 24_000
    """Scenes whose latents are encoded beforehand; each comes back with other noise and another caption."""
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    trains_encoders: bool = True
    """Whether the text encoders learn too; frozen ones stay random."""
    balance_weight: float = 0.01
    """Of the load-balancing loss."""
    ema_decay: float = 0.999
    save_every: int = 500
    log_every: int = 20

    def objective(self) -> ObjectiveSettings:
        """The same as a job's settings."""
        return ObjectiveSettings(
            flow_schedule_shift=self.architecture.schedule_shift,
            use_load_balancing_loss=True,
            load_balancing_loss_weight=self.balance_weight,
        )


class ModelTraining:
    """A run that can be interrupted after any step. Owned by one thread."""

    def __init__(self, directory: Path, settings: ModelSettings, pool: LatentPool, *, device: str = "cpu") -> None:
        """Begin, or go on from the state in the directory.

        Raises:
            ValueError: the state there is of a run with other settings.
        """
        self._directory, self._settings, self._pool, self._device = directory, settings, pool, device
        self.transformer = build_transformer(settings.architecture, seed=settings.seed).to(device).train()
        encoders = build_encoders(settings.architecture, seed=settings.seed)
        self.encoders = {name: encoder.to(device).eval() for name, encoder in encoders.items()}
        self._parameters = _trained(self.transformer, self.encoders if settings.trains_encoders else {})
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), weight_decay=settings.weight_decay, betas=(0.9, 0.99)
        )
        self._ema = Ema(self._parameters, EmaSettings(decay=settings.ema_decay))
        self._draws = SampleDraws(seed=settings.seed, settings=settings.objective())
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

    def export(self, checkpoint: Path, vae: AutoencoderKL) -> Path:
        """Write a checkpoint with the averaged weights, replacing what is there, and return its directory."""
        checkpoint = checkpoint.absolute()
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{checkpoint.name}-", dir=checkpoint.parent) as scratch:
            built = Path(scratch) / "checkpoint"
            with self._ema.swapped():
                save_checkpoint(
                    built,
                    self._settings.architecture,
                    vae=vae,
                    transformer=self.transformer,
                    encoders=self.encoders,
                )
            if checkpoint.exists():
                shutil.rmtree(checkpoint)
            built.rename(checkpoint)
        return checkpoint

    def _resume(self) -> None:
        saved = load_state(self._directory / STATE_FILE, _run(self._settings))
        if saved is None:
            return
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(saved.groups["model"][name])
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
        loss, uses = self._loss(self._batch(step))
        balance = load_balancing_loss(uses)
        self._optimizer.zero_grad()
        (loss + settings.balance_weight * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), 1.0, error_if_nonfinite=True)
        self._optimizer.step()
        self._ema.update(step)
        least = torch.stack([use.shares for use in uses]).min()
        return {"loss": loss.detach(), "balance": balance.detach(), "least_expert": least, "gradient": norm}

    def _batch(self, step: int) -> Batch:
        """Pictures of one size with captions, and the numbers that chance decides."""
        size = size_at(self._settings.seed, step)
        moments = self._pool.moments[size]
        num_samples = samples_at(size, self._settings.batch_size)
        order = Draw(seed=self._settings.seed, stream="shapes/order").generator(step, 0)
        indices = order.integers(len(moments), size=num_samples).tolist()
        noise = Draw(seed=self._settings.seed, stream="shapes/latents").normal(
            step, 0, (num_samples, *moments.shape[2:])
        )
        chosen = moments[indices]
        return Batch(
            latents=chosen[:, 0] + chosen[:, 1] * torch.from_numpy(noise),
            draws=self._draws.draw(step, range(num_samples), tuple(moments.shape[2:])),
            conditioning=self._encode(self._captions(step, size, indices)),
        )

    def _captions(self, step: int, size: tuple[int, int], indices: Sequence[int]) -> list[str]:
        world = World(seed=self._settings.seed, picture_size=size)
        draw = Draw(seed=self._settings.seed, stream="shapes/captions")
        return [
            training_caption(world.training_scene(index), draw, step, position)
            for position, index in enumerate(indices)
        ]

    def _encode(self, captions: Sequence[str]) -> TextConditioning:
        with nullcontext() if self._settings.trains_encoders else torch.no_grad():
            return encode_captions(self.encoders, captions, device=self._device)

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, list[RouterUse]]:
        latents, noise = batch.latents.to(self._device), batch.noise.to(self._device)
        sigmas = batch.draws.sigmas.to(self._device)
        uses: list[RouterUse] = []
        noisy = noisy_latents(latents, noise, sigmas)
        prediction = predict_velocity(self.transformer, noisy, timesteps_of(sigmas), batch.conditioning, uses)
        losses = pixel_losses(prediction, velocity_target(latents, noise), sigmas, self._draws.settings)
        return mean_losses(losses).mean(), uses


def samples_at(size: tuple[int, int], batch_size: int) -> int:
    """Pictures of a size that cost as much as `batch_size` of 64 x 64 pixels."""
    smallest = 64 * 64 // _PATCH_PIXELS + _TEXT_TOKENS
    return max(1, batch_size * smallest // (size[0] * size[1] // _PATCH_PIXELS + _TEXT_TOKENS))


def _trained(transformer: nn.Module, encoders: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """What learns, by name; Llama's head has no part in HiDream."""
    modules = {"transformer": transformer, **encoders}
    return {
        f"{part}.{name}": parameter
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
        if not name.startswith("lm_head")
    }


def _run(settings: ModelSettings) -> Mapping[str, Any]:
    """What a resumed run must share; how often it saves and logs it may change."""
    chosen = asdict(settings)
    return {name: value for name, value in chosen.items() if name not in ("save_every", "log_every")}
