"""Train `reverie-tiny-shapes`: the VAE, then the latents, then encoders and transformer, then the checkpoint.

`python -m reverie_hidream.shapes.train WORK_DIRECTORY CHECKPOINT` starts, and goes on where it was cut off: the states,
the logs and the plots are in the work directory. The same seed, machine and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import torch

from reverie_hidream.shapes.architecture import MAX_BYTES, weight_bytes
from reverie_hidream.shapes.latents import LatentPool, prepare_latents
from reverie_hidream.shapes.train_model import ModelSettings, ModelTraining
from reverie_hidream.shapes.train_vae import STATE_FILE, VaeSettings, VaeTraining, load_trained_vae


def train(
    work_directory: Path, checkpoint: Path, vae_settings: VaeSettings, settings: ModelSettings, *, device: str = "cpu"
) -> Path:
    """Train everything that is not trained yet and write the checkpoint. Blocks for hours at full size.

    Raises:
        ValueError: the work directory has the state of a run with other settings.
    """
    VaeTraining(work_directory, vae_settings, device=device).run()
    vae = load_trained_vae(work_directory, vae_settings)
    pool = latent_pool(work_directory, vae_settings, settings, device=device)
    training = ModelTraining(work_directory, settings, pool, device=device)
    training.run()
    written = training.export(checkpoint, vae.to("cpu"))
    size_bytes = weight_bytes(written)
    sys.stderr.write(f"{written}: {size_bytes / 1e6:.2f} MB of weights, at most {MAX_BYTES / 1e6:.0f} allowed\n")
    return written


def latent_pool(
    work_directory: Path, vae_settings: VaeSettings, settings: ModelSettings, *, device: str = "cpu"
) -> LatentPool:
    """The latents of the training's scenes by the trained VAE, encoded now or earlier."""
    vae = load_trained_vae(work_directory, vae_settings)
    digest = hashlib.sha256((work_directory / STATE_FILE).read_bytes()).hexdigest()
    run = {"seed": settings.seed, "num_scenes": settings.num_scenes, "vae": digest}
    pool = prepare_latents(
        work_directory, vae, seed=settings.seed, num_scenes=settings.num_scenes, run=run, device=device
    )
    mean, deviation = pool.summary()
    sys.stderr.write(f"latents: mean {mean:.3f}, deviation {deviation:.3f}\n")
    return pool


def main() -> None:
    """Train as the command line says."""
    defaults = ModelSettings()
    parser = argparse.ArgumentParser(prog="python -m reverie_hidream.shapes.train", description=train.__doc__)
    parser.add_argument("work_directory", type=Path, help="states, logs and plots; a run goes on from there")
    parser.add_argument("checkpoint", type=Path, help="directory of the finished checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VaeSettings().num_steps)
    parser.add_argument("--steps", type=int, default=defaults.num_steps, help="of the transformer")
    parser.add_argument("--frozen-encoders", action="store_true", help="keep the text encoders random")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")
    train(
        arguments.work_directory,
        arguments.checkpoint,
        VaeSettings(seed=arguments.seed, num_steps=arguments.vae_steps),
        ModelSettings(seed=arguments.seed, num_steps=arguments.steps, trains_encoders=not arguments.frozen_encoders),
        device=arguments.device,
    )


if __name__ == "__main__":
    main()
