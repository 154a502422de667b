"""Measure a checkpoint: pictures of unseen captions, drawn by the project's own sampling code and read by the meter.

`python -m reverie_hidream.shapes.evaluate CHECKPOINT` prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import HiDreamImageTransformer2DModel

from reverie_hidream.conditioning import ENCODERS, TextConditioning, collate
from reverie_hidream.moe import RouterUse
from reverie_hidream.randomness import Draw
from reverie_hidream.sampling import Predict, draw, initial_noise, load_scheduler
from reverie_hidream.shapes.captions import caption_of, parse_caption
from reverie_hidream.shapes.drawing import Picture
from reverie_hidream.shapes.meter import Score, read_picture, score
from reverie_hidream.shapes.world import World
from reverie_hidream.text import TextEncoder, load_text_encoder
from reverie_hidream.transformer import load_transformer, predict_velocity
from reverie_hidream.vae import Vae, load_vae

_EVALUATION_SEED = 20_261_124


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawingSettings:
    """How pictures are drawn."""

    width: int = 64
    height: int = 64
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """What the pictures of a checkpoint are worth; shares are 0 to 1."""

    num_pictures: int
    all_right: float
    background: float
    count: float
    shape: float
    colour: float
    size: float
    position: float
    expert_load: tuple[tuple[float, ...], ...]
    """Share of the assignments of each expert, for each layer with experts."""
    least_expert_load: float
    """Of an expert over all layers."""
    seconds_per_picture: float
    """Of drawing and decoding in batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Painter:
    """A loaded checkpoint that draws captions. Owned by one thread."""

    checkpoint: Path
    transformer: HiDreamImageTransformer2DModel
    vae: Vae
    encoders: dict[str, TextEncoder]

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        """Embeddings of captions."""
        encoded = {name: encoder.encode(captions) for name, encoder in self.encoders.items()}
        return collate([{name: encoded[name][place].tensor for name in ENCODERS} for place in range(len(captions))])

    def draw(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        settings: DrawingSettings,
        predict: Predict = predict_velocity,
    ) -> list[Picture]:
        """One picture for each caption, from its own seed; (H, W, 3) uint8."""
        positive = self.encode(captions)
        latents = draw(
            self.transformer,
            load_scheduler(self.checkpoint),
            positive,
            self.encode([""]).repeat(len(captions)),
            width=settings.width,
            height=settings.height,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            noise=torch.cat([initial_noise(seed, settings.height, settings.width) for seed in seeds]),
            predict=predict,
        )
        return [picture.numpy() for picture in self.vae.decode(latents)]


def load_painter(checkpoint: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Painter:
    """Load all parts of a checkpoint."""
    return Painter(
        checkpoint=checkpoint,
        transformer=load_transformer(checkpoint, device=device, dtype=dtype),
        vae=load_vae(checkpoint, device=device, dtype=dtype),
        encoders={name: load_text_encoder(checkpoint, name, device=device, dtype=dtype) for name in ENCODERS},
    )


def unseen_captions(num_captions: int) -> list[str]:
    """Different captions of held-out combinations, always the same."""
    world, draws = World(seed=_EVALUATION_SEED), Draw(seed=_EVALUATION_SEED, stream="shapes/evaluation")
    captions: dict[str, None] = {}
    index = 0
    while len(captions) < num_captions:
        captions.setdefault(caption_of(world.unseen_scene(index), draws, index))
        index += 1
    return list(captions)


def evaluate(
    painter: Painter, *, num_captions: int = 256, num_seeds: int = 3, settings: DrawingSettings | None = None
) -> Quality:
    """Draw unseen captions and read the pictures, shown on stderr. Blocks for minutes at full size."""
    settings = settings or DrawingSettings()
    captions = unseen_captions(num_captions)
    work = [(caption, seed) for seed in range(num_seeds) for caption in captions]
    scores: list[Score] = []
    load = _LoadMeter()
    started = time.monotonic()
    for start in range(0, len(work), settings.batch_size):
        part = work[start : start + settings.batch_size]
        pictures = painter.draw([caption for caption, _ in part], [seed for _, seed in part], settings, load.predict)
        scores += [
            score(parse_caption(caption), read_picture(picture))
            for (caption, _), picture in zip(part, pictures, strict=True)
        ]
        sys.stderr.write(f"\rpictures {len(scores)}/{len(work)}")
        sys.stderr.flush()
    sys.stderr.write("\n")
    seconds = (time.monotonic() - started) / len(work)
    return _quality(scores, load.load(), seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class _LoadMeter:
    """A prediction that also counts where the tokens go."""

    shares: list[torch.Tensor] = field(default_factory=list)
    """(layers, experts) for each prediction, times its samples."""

    def predict(
        self,
        transformer: HiDreamImageTransformer2DModel,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: TextConditioning,
    ) -> torch.Tensor:
        uses: list[RouterUse] = []
        velocity = predict_velocity(transformer, latents, timesteps, conditioning, uses)
        self.shares.append(latents.shape[0] * torch.stack([use.shares.cpu() for use in uses]))
        return velocity

    def load(self) -> tuple[tuple[float, ...], ...]:
        """Share of each expert in every layer, over all predictions."""
        sums = torch.stack(self.shares).sum(dim=0)
        return tuple(tuple(layer) for layer in (sums / sums.sum(dim=-1, keepdim=True)).tolist())


def _quality(scores: Sequence[Score], load: tuple[tuple[float, ...], ...], seconds: float) -> Quality:
    def share(name: str) -> float:
        kept = sum(1 for one in scores if getattr(one, name))
        return round(kept / len(scores), 4)

    return Quality(
        num_pictures=len(scores),
        all_right=share("all_right"),
        background=share("background"),
        count=share("count"),
        shape=share("shape"),
        colour=share("colour"),
        size=share("size"),
        position=share("position"),
        expert_load=tuple(tuple(round(value, 4) for value in layer) for layer in load),
        least_expert_load=round(min(min(layer) for layer in load), 4),
        seconds_per_picture=round(seconds, 4),
    )


def main() -> None:
    """Measure the checkpoint of the command line."""
    parser = argparse.ArgumentParser(prog="python -m reverie_hidream.shapes.evaluate", description=evaluate.__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=DrawingSettings().guidance_scale)
    parser.add_argument("--steps", type=int, default=DrawingSettings().num_inference_steps)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    settings = DrawingSettings(
        width=arguments.width,
        height=arguments.height,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
    )
    painter = load_painter(arguments.checkpoint, device=arguments.device)
    quality = evaluate(painter, num_captions=arguments.captions, num_seeds=arguments.seeds, settings=settings)
    sys.stdout.write(json.dumps(asdict(quality), indent=2) + "\n")


if __name__ == "__main__":
    main()
