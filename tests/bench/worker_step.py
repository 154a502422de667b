"""One training step of the worker against a bare diffusers + lycoris loop, on the same batch in memory, one thread.

Ours is `TrainingEngine.train_step` as the worker builds it: sort-based MoE with gradients, folded padding, LoKr hooked
into the Linears, deterministic algorithms switched on. The bare loop is what a person writes with public API only:
diffusers' transformer in training mode (built with `force_inference_output=False`, the configuration set to True
afterwards, so that experts get gradients and images come out), `lycoris.create_lycoris` in bypass mode (faster than
its default, which builds every kron), `mse_loss` in float32, `clip_grad_norm_`, `torch.optim.AdamW`.

Both train the same LoKr on the attention of the tiny checkpoint, from the same start, on the same latents, noise,
noise level and embeddings. Their first loss must agree, or the comparison is refused. The ratio is time ours / bare:
below 1 is faster. The limit holds where both compute the same tokens, in a square picture; a non-square one is padded
to the whole canvas by diffusers and folded by us.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel
from lycoris import LycorisNetwork, create_lycoris
from reverie_hidream.adapters.config import LokrConfig
from reverie_hidream.adapters.lokr import attach_lokr
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.flow import sample_sigmas
from reverie_hidream.tiny import make_tiny_checkpoint
from reverie_hidream.training.batch import Batch, BatchDraws
from reverie_hidream.transformer import load_transformer
from reverie_trainer.jobs.spec import Optimization
from reverie_trainer.worker.engine import TrainingEngine

from tests.bench.report import Figure, interleaved, median_ratio

ROUNDS = 15
LIMIT = 1.15
FACTOR, FULL_RANK = 4, 16384
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
SQUARE, NON_SQUARE = (256, 256), (96, 160)
FIRST_LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What both loops train."""

    dtype: torch.dtype
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    is_recomputed: bool
    """Gradient checkpointing."""

    @property
    def is_square(self) -> bool:
        """Whether no padding is involved."""
        return self.height == self.width

    @property
    def name(self) -> str:
        """The case for people."""
        dtype = str(self.dtype).removeprefix("torch.")
        recomputed = ", checkpointing" if self.is_recomputed else ""
        return f"worker step {dtype} {self.width}x{self.height}{recomputed}, time against bare loop"


def measure() -> Iterator[Figure]:
    """Yield the ratio of times, ours / bare, for each dtype, shape and way of checkpointing."""
    torch.set_num_threads(1)
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lycoris|diffusers|torch)\..*")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_tiny_checkpoint(Path(folder) / "tiny")
        for dtype in (torch.float32, torch.bfloat16):
            for height, width in (SQUARE, NON_SQUARE):
                for is_recomputed in (False, True):
                    case = Case(dtype=dtype, height=height, width=width, is_recomputed=is_recomputed)
                    yield _compare(checkpoint, case)


def _compare(checkpoint: Path, case: Case) -> Figure:
    batch = make_batch(checkpoint, case)
    ours, bare = OurLoop(checkpoint, case), BareLoop(checkpoint, case)
    first, expected = ours.step(batch), bare.step(batch)
    if not math.isclose(first, expected, rel_tol=FIRST_LOSS_TOLERANCE[case.dtype]):
        raise AssertionError(f"{case.name}: the first loss is {first}, that of the bare loop {expected}")
    our_seconds, bare_seconds = interleaved([lambda: ours.step(batch), lambda: bare.step(batch)], rounds=ROUNDS)
    ratio = median_ratio(our_seconds, bare_seconds)
    return Figure(name=case.name, value=ratio, unit="ratio", at_most=LIMIT if case.is_square else None)


def make_batch(checkpoint: Path, case: Case) -> Batch:
    """One sample of random latents and embeddings, the embeddings in the model's dtype as both loops take them."""
    config = HiDreamImageTransformer2DModel.load_config(checkpoint, subfolder="transformer")
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    latents = (1, config["in_channels"], case.height // 8, case.width // 8)
    t5_width, llama_width = config["caption_channels"]
    num_llama_layers = 1 + max(config["llama_layers"])
    return Batch(
        latents=normal(*latents),
        draws=BatchDraws(noise=normal(*latents), sigmas=sample_sigmas(normal(1))),
        conditioning=TextConditioning(
            t5=normal(1, 128, t5_width).to(case.dtype),
            llama=normal(num_llama_layers, 1, 128, llama_width).to(case.dtype),
            pooled=normal(1, config["text_emb_dim"]).to(case.dtype),
        ),
    )


class OurLoop:
    """The worker's own step."""

    def __init__(self, checkpoint: Path, case: Case) -> None:
        """Build the model, the adapter and the optimiser as the worker does."""
        transformer = load_transformer(checkpoint, dtype=case.dtype)
        preset = {"target_module": ["Attention"]}
        config = LokrConfig.from_dict(
            {"algo": "lokr", "factor": FACTOR, "linear_dim": FULL_RANK, "full_matrix": True, "apply_preset": preset}
        )
        optimization = Optimization(
            max_steps=1_000_000,
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            grad_clip_method="norm",
            weight_decay=0.01,
            gradient_checkpointing=case.is_recomputed,
        )
        self._engine = TrainingEngine(transformer, attach_lokr(transformer, config), optimization)
        self._numbers = count(1)

    def step(self, batch: Batch) -> float:
        """Train one step with the algorithms that the worker asks torch for; returns the loss."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        # As the worker does: filling every new tensor is for programs that read memory that they did not write.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set on the module
        try:
            return self._engine.train_step(next(self._numbers), [batch]).loss
        finally:
            torch.use_deterministic_algorithms(False)


class BareLoop:
    """diffusers and lycoris, nothing else."""

    def __init__(self, checkpoint: Path, case: Case) -> None:
        """Build the model, the adapter and the optimiser by public API."""
        model: Any = HiDreamImageTransformer2DModel.from_pretrained(
            checkpoint, subfolder="transformer", dtype=case.dtype, local_files_only=True, force_inference_output=False
        )
        # The experts keep the constructor's False, which lets gradients through; unpatchify reads the configuration.
        model.register_to_config(force_inference_output=True)
        model.requires_grad_(False)
        model.train()
        if case.is_recomputed:
            model.enable_gradient_checkpointing()
        LycorisNetwork.apply_preset({"enable_conv": False, "target_module": ["HiDreamAttention"]})
        network: Any = create_lycoris(
            model,
            1.0,
            linear_dim=FULL_RANK,
            linear_alpha=1.0,
            algo="lokr",
            factor=FACTOR,
            full_matrix=True,
            bypass_mode=True,
        )
        network.apply_to()
        self._model = model
        self._parameters = list(network.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, weight_decay=0.01)

    def step(self, batch: Batch) -> float:
        """Train one step; returns the loss."""
        sigma = batch.draws.sigmas
        level = sigma.view(-1, 1, 1, 1)
        noisy = (1 - level) * batch.latents + level * batch.noise
        prediction = self._model(
            hidden_states=noisy.to(self._model.dtype),
            timesteps=1000 * sigma,
            encoder_hidden_states_t5=batch.conditioning.t5,
            encoder_hidden_states_llama3=batch.conditioning.llama,
            pooled_embeds=batch.conditioning.pooled,
            return_dict=False,
        )[0]
        loss = torch.nn.functional.mse_loss(-prediction.float(), batch.noise - batch.latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.item())
