"""`make bench-gpu`: training steps of the full-size transformer with random weights, beside unmodified diffusers.

One script, no services, no checkpoint: torch, diffusers, lycoris-lora and optimum-quanto are enough, so that a checkout
can be carried to a machine without a network. The weights are made on the device and quantised part by part; the
adapter is the reference LoKr; model, adapter, objective and optimizer (AdamW) are those of the worker. Every case is
measured after a warm-up, with device events. Figures go to standard output and, as JSON, to --out.

On a machine without a GPU: --device cpu --shape small, which is what the tests run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "shared")]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from diffusers import HiDreamImageTransformer2DModel
from lycoris import LycorisNetwork, create_lycoris
from reverie_hidream.adapters.config import LokrConfig
from reverie_hidream.adapters.lokr import attach_lokr
from reverie_hidream.assembly import assemble
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.flow import sample_sigmas
from reverie_hidream.optimizers import AdapterUpdate, GradientFigures, UpdateSettings, build_update
from reverie_hidream.training.batch import Batch, BatchDraws
from reverie_hidream.training.step import StepSettings, TrainingStep
from reverie_hidream.transformer import REAL_CONFIG, build_meta_transformer, prepare_transformer
from torch import nn

SMALL_CONFIG: Mapping[str, Any] = {
    **REAL_CONFIG,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "caption_channels": [48, 64],
    "text_emb_dim": 80,
    "axes_dims_rope": [16, 8, 8],
    "max_resolution": [16, 16],
    "llama_layers": [0, 1, 1],
    "_text_tokens": 16,
}
"""The same model, small enough for a test."""

FULL_SIZES = ((512, 512), (1024, 1024), (640, 448), (1216, 832))
SMALL_SIZES = ((64, 64), (128, 64))
TEXT_TOKENS = 128
"""Of each of the three texts; a configuration may say another number."""

LEARNING_RATE, MAX_GRAD_NORM = 4e-5, 0.01
"""Of the reference configuration."""

LOSS_TOLERANCE = 2e-2
"""Relative difference of losses in bfloat16."""

WARM_UP_STEPS = 3
MAX_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is measured."""

    precision: str
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    batch_size: int = 1
    checkpointing: bool = True
    loop: str = "reverie"
    """`reverie`, or `diffusers`: the same loop on unmodified diffusers modules."""

    def __str__(self) -> str:
        """The case in one line."""
        recompute = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"{self.loop} {self.precision} {self.width}x{self.height} batch {self.batch_size} {recompute}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was measured; times in seconds."""

    case: Case
    status: str = "measured"
    """`measured`, `does not fit` or `out of time`."""
    num_steps: int = 0
    step_median: float = math.nan
    step_p10: float = math.nan
    step_p90: float = math.nan
    forward: float = math.nan
    backward: float = math.nan
    optimizer: float = math.nan
    host: float = math.nan
    """What the step takes on the host's clock beyond the device's."""
    peak_memory_bytes: int = 0
    share_of_peak: float = math.nan
    """Arithmetic of the step (without recomputing) over the time, relative to the measured matrix product."""
    ratio_to_diffusers: float | None = None
    first_loss: float = math.nan


class Clock:
    """Marks moments on the device, or on the host where that is the device."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: dict[str, Any] = {}

    def mark(self, name: str) -> None:
        """Remember the present moment under a name."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def seconds(self, begin: str, end: str) -> float:
        """Seconds between two marks of a step that is over."""
        if self._is_cuda:
            return float(self._marks[begin].elapsed_time(self._marks[end])) / 1e3
        return float(self._marks[end] - self._marks[begin])


class TimedUpdate:
    """An update that marks where the forward pass, the backward pass and the optimizer end."""

    def __init__(self, update: AdapterUpdate, clock: Clock) -> None:
        self._update = update
        self._clock = clock

    def begin(self, learning_rate: float) -> None:
        """See AdapterUpdate."""
        self._clock.mark("begin")
        self._update.begin(learning_rate)

    def accept(self, loss: torch.Tensor) -> None:
        """See AdapterUpdate."""
        self._clock.mark("forward")
        self._update.accept(loss)

    def finish(self, loss: torch.Tensor, others: Sequence[torch.Tensor] = ()) -> GradientFigures:
        """See AdapterUpdate."""
        self._clock.mark("backward")
        figures = self._update.finish(loss, others)
        self._clock.mark("optimizer")
        return figures

    def tensors(self) -> dict[str, torch.Tensor]:
        """See AdapterUpdate."""
        return self._update.tensors()

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """See AdapterUpdate."""
        self._update.load_tensors(tensors)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """See AdapterUpdate."""
        with self._update.averaged():
            yield


class ReverieLoop:
    """The worker's training step."""

    def __init__(
        self, transformer: HiDreamImageTransformer2DModel, case: Case, clock: Clock, config: LokrConfig
    ) -> None:
        self._adapter = attach_lokr(transformer, config)
        update = build_update(
            self._adapter.parameters(), UpdateSettings(learning_rate=LEARNING_RATE, clip_limit=MAX_GRAD_NORM)
        )
        self._step = TrainingStep(
            transformer,
            self._adapter,
            TimedUpdate(update, clock),
            StepSettings(gradient_checkpointing=case.checkpointing),
            learning_rate=lambda _: LEARNING_RATE,
        )
        self._number = 0

    def step(self, batch: Batch) -> float:
        """Train one step; returns the loss."""
        self._number += 1
        return self._step.train_step(self._number, [batch]).loss

    def close(self) -> None:
        """Take the adapter off the model."""
        self._adapter.detach()


class DiffusersLoop:
    """diffusers' forward pass and lycoris' modules, nothing of ours, on the same weights."""

    def __init__(
        self, transformer: HiDreamImageTransformer2DModel, case: Case, clock: Clock, config: LokrConfig
    ) -> None:
        self._clock = clock
        self._model: Any = transformer
        self._model.train()
        self._model.gradient_checkpointing = False
        if case.checkpointing:
            self._model.enable_gradient_checkpointing()
        LycorisNetwork.apply_preset({"enable_conv": False, "target_module": ["HiDreamAttention"]})
        self._network: Any = create_lycoris(
            self._model,
            1.0,
            linear_dim=config.linear_dim,
            linear_alpha=config.linear_alpha,
            algo="lokr",
            factor=config.factor,
            full_matrix=True,
            use_scalar=config.use_scalar,
            bypass_mode=True,
        )
        self._network.apply_to()
        self._network.to(self._model.x_embedder.proj.bias.device)
        self._parameters = list(self._network.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    def step(self, batch: Batch) -> float:
        """Train one step; returns the loss."""
        device, dtype = self._model.x_embedder.proj.bias.device, self._model.x_embedder.proj.bias.dtype
        self._clock.mark("begin")
        latents, noise = batch.latents.to(device), batch.noise.to(device)
        sigmas = batch.draws.sigmas.to(device)
        level = sigmas.view(-1, 1, 1, 1)
        conditioning = batch.conditioning.to(device, dtype)
        prediction = self._model(
            hidden_states=((1 - level) * latents + level * noise).to(dtype),
            timesteps=1000 * sigmas,
            encoder_hidden_states_t5=conditioning.t5,
            encoder_hidden_states_llama3=conditioning.llama,
            pooled_embeds=conditioning.pooled,
            return_dict=False,
        )[0]
        loss = torch.nn.functional.mse_loss(-prediction.float(), noise - latents)
        self._clock.mark("forward")
        loss.backward()
        self._clock.mark("backward")
        torch.nn.utils.clip_grad_value_(self._parameters, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        value = float(loss.item())
        self._clock.mark("optimizer")
        return value

    def close(self) -> None:
        """Take the adapter off the model."""
        self._network.restore()


LOOPS: Mapping[str, type[ReverieLoop] | type[DiffusersLoop]] = {"reverie": ReverieLoop, "diffusers": DiffusersLoop}


@dataclass(kw_only=True)
class Bench:
    """Everything that the cases share."""

    device: torch.device
    config: Mapping[str, Any]
    factor: int
    num_steps: int
    deadline: float
    """On the monotonic clock; no case is begun after it."""
    peak_flops: float
    max_batch: int = MAX_BATCH
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, precisions: Sequence[str], sizes: Sequence[tuple[int, int]]) -> None:
        """Measure every case."""
        for precision in precisions:
            _say(f"building the transformer, {precision}")
            transformer = random_transformer(self.config, self.device, precision)
            for width, height in sizes:
                self._measure_size(transformer, Case(precision=precision, width=width, height=height))
            del transformer
            _free(self.device)

    def _measure_size(self, transformer: HiDreamImageTransformer2DModel, case: Case) -> None:
        for checkpointing in (True, False):
            one = replace(case, checkpointing=checkpointing)
            ours = self._measure(transformer, one)
            theirs = self._measure(transformer, replace(one, loop="diffusers"))
            _require_equal_losses(ours, theirs)
            ratio = ours.step_median / theirs.step_median
            self._add(replace(ours, ratio_to_diffusers=ratio if math.isfinite(ratio) else None))
            self._add(theirs)
        self._add_largest_batch(transformer, case)

    def _add_largest_batch(self, transformer: HiDreamImageTransformer2DModel, case: Case) -> None:
        """The largest power of two that fits, with checkpointing."""
        largest = None
        batch_size = 2
        while batch_size <= self.max_batch:
            outcome = self._measure(transformer, replace(case, batch_size=batch_size))
            if outcome.status != "measured":
                break
            largest = outcome
            batch_size *= 2
        if largest is not None:
            self._add(largest)

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        _say(describe(outcome))

    def _measure(self, transformer: HiDreamImageTransformer2DModel, case: Case) -> Outcome:
        if time.monotonic() > self.deadline:
            return Outcome(case=case, status="out of time")
        _free(self.device)
        try:
            return self._measure_now(transformer, case)
        except torch.OutOfMemoryError:
            return Outcome(case=case, status="does not fit")
        finally:
            transformer.zero_grad(set_to_none=True)
            _free(self.device)

    def _measure_now(self, transformer: HiDreamImageTransformer2DModel, case: Case) -> Outcome:
        clock = Clock(self.device)
        loop = LOOPS[case.loop](transformer, case, clock, reference_lokr(self.factor))
        try:
            batch = random_batch(self.config, case)
            first_loss = loop.step(batch)
            for _ in range(WARM_UP_STEPS - 1):
                loop.step(batch)
            samples = [self._time(loop, batch, clock) for _ in range(self.num_steps)]
        finally:
            loop.close()
        walls = [sample["wall"] for sample in samples]
        median = statistics.median(walls)
        return Outcome(
            case=case,
            num_steps=len(samples),
            step_median=median,
            step_p10=_quantile(walls, 0.1),
            step_p90=_quantile(walls, 0.9),
            forward=statistics.median(sample["forward"] for sample in samples),
            backward=statistics.median(sample["backward"] for sample in samples),
            optimizer=statistics.median(sample["optimizer"] for sample in samples),
            host=statistics.median(sample["host"] for sample in samples),
            peak_memory_bytes=_peak_memory(self.device),
            share_of_peak=training_flops(self.config, case) / median / self.peak_flops,
            first_loss=first_loss,
        )

    def _time(self, loop: ReverieLoop | DiffusersLoop, batch: Batch, clock: Clock) -> dict[str, float]:
        _synchronize(self.device)
        begin = time.perf_counter()
        loop.step(batch)
        _synchronize(self.device)
        wall = time.perf_counter() - begin
        sample = {
            "wall": wall,
            "forward": clock.seconds("begin", "forward"),
            "backward": clock.seconds("forward", "backward"),
            "optimizer": clock.seconds("backward", "optimizer"),
        }
        sample["host"] = max(0.0, wall - sample["forward"] - sample["backward"] - sample["optimizer"])
        return sample


def _require_equal_losses(ours: Outcome, theirs: Outcome) -> None:
    """Both loops must compute the same, or their times say nothing."""
    if ours.status != "measured" or theirs.status != "measured":
        return
    if not math.isclose(ours.first_loss, theirs.first_loss, rel_tol=LOSS_TOLERANCE):
        raise AssertionError(f"{ours.case}: the first loss is {ours.first_loss}, diffusers' {theirs.first_loss}")


PARTS = ("forward", "backward", "optimizer", "host")


def random_transformer(
    config: Mapping[str, Any], device: torch.device, precision: str
) -> HiDreamImageTransformer2DModel:
    """The model with random weights, made on the device and quantised part by part, frozen."""
    transformer = build_meta_transformer(config)
    assemble(transformer, RandomWeights(device), device=device, dtype=torch.bfloat16, precision=precision)
    prepare_transformer(transformer)
    # Both loops need images; the experts keep the constructor's setting, which lets gradients through.
    transformer.register_to_config(force_inference_output=True)
    return transformer


class RandomWeights:
    """Weights of the size that training gives them: matrices of variance 1 / inputs, norms' scales 1, biases 0."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, name: str, part: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        """See assembly.WeightSource."""
        del name
        part.to_empty(device=device).to(dtype)
        with torch.no_grad():
            for tensor in part.parameters():
                if tensor.ndim >= 2:
                    tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=self._generator)
            for key, tensor in part.named_parameters():
                if key.endswith("bias"):
                    tensor.zero_()
                elif tensor.ndim == 1:
                    tensor.fill_(1.0)


def reference_lokr(factor: int) -> LokrConfig:
    """The first reference configuration: full matrices on the attention (spec 4.1)."""
    return LokrConfig(factor=factor, use_scalar=True)


def random_batch(config: Mapping[str, Any], case: Case) -> Batch:
    """Latents, noise and embeddings of a case; the same for both loops."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    num_layers = max(config["llama_layers"]) + 1
    size, wide, tokens = case.batch_size, config["caption_channels"], _text_tokens(config)
    latents = (size, config["in_channels"], case.height // 8, case.width // 8)
    return Batch(
        latents=normal(*latents),
        draws=BatchDraws(noise=normal(*latents), sigmas=sample_sigmas(normal(size))),
        conditioning=TextConditioning(
            t5=normal(size, tokens, wide[0]).bfloat16(),
            llama=normal(num_layers, size, tokens, wide[1]).bfloat16(),
            pooled=normal(size, config["text_emb_dim"]).bfloat16(),
        ),
    )


def training_flops(config: Mapping[str, Any], case: Case) -> float:
    """Floating-point operations of a step without recomputing: forward, and gradients of inputs (spec 10.3)."""
    linear, attention = forward_flops(config, case)
    # The backward pass of attention is 2.5 times its forward pass.
    return case.batch_size * (2 * linear + 3.5 * attention)


def forward_flops(config: Mapping[str, Any], case: Case) -> tuple[float, float]:
    """(Linear layers, attention) of one sample's forward pass, at its true number of tokens."""
    width = config["attention_head_dim"] * config["num_attention_heads"]
    expert, shared = _swiglu_width(4 * width), _swiglu_width(2 * width)
    image = (case.height // 16) * (case.width // 16)
    text = 3 * _text_tokens(config)
    mixture = 3 * width * (config["num_activated_experts"] * expert + shared)
    attention_weights = 4 * width**2
    double = (attention_weights + mixture) * image + (attention_weights + 3 * width * expert) * text
    single = (attention_weights + mixture) * (image + text)
    num_blocks = config["num_layers"] + config["num_single_layers"]
    modulation = (12 * config["num_layers"] + 6 * config["num_single_layers"]) * width**2
    captions = (
        _text_tokens(config) * width * (num_blocks * config["caption_channels"][1] + config["caption_channels"][0])
    )
    linear = config["num_layers"] * double + config["num_single_layers"] * single + modulation + captions
    return 2.0 * linear, 4.0 * (image + text) ** 2 * width * num_blocks


def _text_tokens(config: Mapping[str, Any]) -> int:
    return int(config.get("_text_tokens", TEXT_TOKENS))


def _swiglu_width(hidden: int) -> int:
    return 256 * math.ceil(int(2 * hidden / 3) / 256)


def measure_peak_flops(device: torch.device, size: int) -> float:
    """bfloat16 matrix products that this machine does, in floating-point operations a second."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock = Clock(device)
    seconds = []
    for _ in range(8):
        _synchronize(device)
        clock.mark("begin")
        for _ in range(4):
            left @ right
        clock.mark("end")
        _synchronize(device)
        seconds.append(clock.seconds("begin", "end") / 4)
    return float(2 * size**3 / statistics.median(seconds[2:]))


def describe(outcome: Outcome) -> str:
    """An outcome in one line."""
    if outcome.status != "measured":
        return f"{outcome.case}: {outcome.status}"
    ratio = "" if outcome.ratio_to_diffusers is None else f", {outcome.ratio_to_diffusers:.2f} of diffusers' time"
    parts = ", ".join(f"{part} {getattr(outcome, part) * 1e3:.0f}" for part in PARTS)
    return (
        f"{outcome.case}: {outcome.step_median:.4f} s/step (p10 {outcome.step_p10:.4f}, p90 {outcome.step_p90:.4f}; "
        f"ms: {parts}), {outcome.peak_memory_bytes / 1e9:.2f} GB, {outcome.share_of_peak:.0%} of the matrix peak{ratio}"
    )


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on and with."""
    names = ("torch", "diffusers", "lycoris-lora", "optimum-quanto")
    facts: dict[str, Any] = {
        "device": "cpu",
        "versions": {name: metadata.version(name) for name in names},
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cuda"] = torch.version.cuda or ""
        facts["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = _parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        _say("there is no CUDA device; for a look at what is measured: --device cpu --shape small")
        return 2
    device = torch.device(options.device)
    is_full = options.shape == "full"
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    begin = time.monotonic()
    peak = measure_peak_flops(device, 8192 if device.type == "cuda" else 512)
    _say(f"{machine(device)['device']}: {peak / 1e12:.1f} TFLOP/s in bfloat16 matrix products")
    bench = Bench(
        device=device,
        config=REAL_CONFIG if is_full else SMALL_CONFIG,
        factor=16 if is_full else 4,
        num_steps=options.steps,
        deadline=begin + options.seconds,
        peak_flops=peak,
        max_batch=options.max_batch,
    )
    bench.run(options.precisions, FULL_SIZES if is_full else SMALL_SIZES)
    if options.out is not None:
        report = {**machine(device), "peak_flops": peak, "cases": [asdict(outcome) for outcome in bench.outcomes]}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(_finite(report), indent=1) + "\n", encoding="utf-8")
        _say(f"written to {options.out}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--shape", choices=("full", "small"), default="full", help="the released model, or a test's")
    parser.add_argument("--precisions", nargs="+", default=["no_change", "int8-quanto"], help="how the base is held")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each case")
    parser.add_argument("--max-batch", type=int, default=MAX_BATCH, help="largest batch to try")
    parser.add_argument("--seconds", type=float, default=540.0, help="no case is begun after so long")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def _finite(value: Any) -> Any:
    """The same with None for what JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
