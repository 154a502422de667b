"""The resident transformer and the adapters on it. torch stays behind this module; requests stay before it."""

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reverie_common.concurrency import Parkable, Parking
from reverie_common.errors import InvalidArgumentError, ResourceExhaustedError
from reverie_common.storage.tensors import RawTensor
from reverie_hidream.adapters.adapter import TrainableAdapter
from reverie_hidream.adapters.files import AdapterFileError, load_adapter
from reverie_hidream.checkpoint import component_fingerprint, require_parts
from reverie_hidream.compilation import CompiledPrediction
from reverie_hidream.conditioning import TextConditioning, collate
from reverie_hidream.host_copy import HostCopy
from reverie_hidream.sampling import (
    PreviewHook,
    StepPreview,
    draw,
    initial_noise,
    load_scheduler,
    named_scheduler,
)
from reverie_hidream.tensor_io import from_raw, to_raw
from reverie_hidream.transformer import canvas_pixels, load_transformer, pixel_multiple, predict_velocity

logger = logging.getLogger(__name__)

CODE_VERSION = "sampling-1"
"""Change it with anything that changes a picture for the same request."""

PARTS = ("transformer", "scheduler")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerFacts:
    """What callers may know about the loaded model."""

    fingerprint: str
    """Hex sha256 over the transformer's weights and configuration."""
    drawing_fingerprint: str
    """Hex sha256 over all that a latent depends on besides the request: scheduler, precision, dtype, device, code."""
    precision: str
    device: str
    max_pixels: int
    """Largest picture that is not square."""
    pixel_multiple: int
    """Sides are multiples of this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One latent to draw."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    num_inference_steps: int
    guidance_scale: float
    seed: int
    shift: float | None
    positive: Mapping[str, RawTensor]
    """Embeddings of the prompt, by encoder."""
    negative: Mapping[str, RawTensor] | None
    """Those of the negative prompt, where there is guidance."""
    adapter_sha256: str | None
    """An adapter that `add_adapter` loaded; None draws with the base model."""
    adapter_strength: float
    guidance_rescale: float = 0.0
    scheduler: str | None = None
    """None is the checkpoint's own."""
    preview_steps: int = 0
    """0 makes no previews."""
    compile: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentPreview:
    """What a picture would be if it were finished after this step."""

    step: int
    num_steps: int
    timestep: float
    latents: RawTensor
    """(1, 16, height / 8, width / 8) float32, scaled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawingHooks:
    """Who is told while a latent is drawn, all in the engine's thread."""

    on_step: Callable[[int, int], None]
    """After every step: (steps done, steps in all)."""
    should_stop: Callable[[], bool]
    """Asked before every step."""
    on_preview: Callable[[LatentPreview], None]


class SamplerEngine:
    """Owned by one thread."""

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        facts: SamplerFacts,
        *,
        max_adapters: int,
        compile_backend: str = "inductor",
        idle_seconds: float = 0.0,
        on_parked: Callable[[bool], None] = lambda _: None,
        parkable: Parkable | None = None,
    ) -> None:
        """Draw with the base model until there are adapters.

        Args:
            idle_seconds: How long there is no work before the transformer waits in host memory; 0 is for ever.
            on_parked: Told whether it waits in host memory, whenever that changes.
            parkable: How it is moved.
        """
        self._parking = Parking(
            parkable or HostCopy(transformer, torch.device(facts.device)),
            idle_seconds=idle_seconds,
            on_change=on_parked,
        )
        self.facts = facts
        self._transformer = transformer
        self._scheduler = scheduler
        self._max_adapters = max_adapters
        self._num_channels = int(transformer.config.in_channels)
        self._compiled = CompiledPrediction(backend=compile_backend)
        # All are on the model, at strength 0 but for the one that draws: swapping moves no bytes.
        self._adapters: OrderedDict[str, TrainableAdapter] = OrderedDict()

    @property
    def adapter_sha256s(self) -> Sequence[str]:
        """Adapters in memory, the most recently used first."""
        return tuple(reversed(self._adapters))

    @property
    def compile_problem(self) -> str | None:
        """Why drawings that ask to be compiled are not; None as long as compiling works."""
        return self._compiled.problem

    def add_adapter(self, sha256: str, body: bytes) -> None:
        """Put the adapter of a file on the model. Blocks for milliseconds.

        Raises:
            InvalidArgumentError: it is no LoKr file, or one for another model.
        """
        try:
            # An adapter lies beside the weights that it changes.
            with self._parking.in_use():
                # A whole transformer takes the weights that it finds for the base.
                self._select(None, 0.0)
                adapter = load_adapter(self._transformer, body, strength=0.0)
        except AdapterFileError as error:
            raise InvalidArgumentError(
                f"{error}; use an adapter that was trained on this model", reason="UNUSABLE_ADAPTER"
            ) from error
        self._adapters[sha256] = adapter
        while len(self._adapters) > self._max_adapters:
            _, oldest = self._adapters.popitem(last=False)
            oldest.detach()

    def draw(self, drawing: Drawing, hooks: DrawingHooks) -> RawTensor:
        """Draw one latent: (1, 16, height / 8, width / 8) float32, scaled. Blocks for all steps.

        Raises:
            SamplingStopped: `should_stop` said so.
            ResourceExhaustedError: the device has too little memory for this size.
        """
        self._select(drawing.adapter_sha256, drawing.adapter_strength)
        try:
            with self._parking.in_use():
                return to_raw(self._draw(drawing, hooks))
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(drawing) from error

    def close(self) -> None:
        """Park no more by itself. Safe to repeat."""
        self._parking.close()

    def _draw(self, drawing: Drawing, hooks: DrawingHooks) -> torch.Tensor:
        own = self._scheduler
        return draw(
            self._transformer,
            own if drawing.scheduler is None else named_scheduler(drawing.scheduler, own),
            _conditioning(drawing.positive),
            None if drawing.negative is None else _conditioning(drawing.negative),
            width=drawing.width,
            height=drawing.height,
            num_inference_steps=drawing.num_inference_steps,
            guidance_scale=drawing.guidance_scale,
            guidance_rescale=drawing.guidance_rescale,
            noise=initial_noise(drawing.seed, drawing.height, drawing.width, self._num_channels),
            shift=drawing.shift,
            seed=drawing.seed,
            predict=self._compiled if drawing.compile else predict_velocity,
            on_step=hooks.on_step,
            previews=_preview_hook(drawing.preview_steps, hooks.on_preview),
            should_stop=hooks.should_stop,
        ).cpu()

    def _select(self, sha256: str | None, strength: float) -> None:
        # The others first: a whole transformer that goes puts the base's weights back.
        for name, adapter in self._adapters.items():
            if name != sha256:
                adapter.set_strength(0.0)
        if sha256 is not None:
            self._adapters[sha256].set_strength(strength)
            self._adapters.move_to_end(sha256)


def load_engine(
    checkpoint: Path,
    *,
    device: str,
    dtype: str,
    precision: str,
    num_threads: int,
    max_adapters: int,
    compile_backend: str = "inductor",
    idle_seconds: float = 0.0,
    on_parked: Callable[[bool], None] = lambda _: None,
) -> tuple[SamplerEngine, float]:
    """Load the transformer and the scheduler; also the seconds that it took. Blocks for seconds to minutes.

    Raises:
        NotFoundError: a part of the checkpoint is missing; names it and the remedy.
        InvalidArgumentError: this machine has no such device.
    """
    torch.set_num_threads(num_threads)
    require_parts(checkpoint, PARTS)
    _require_device(device)
    started = time.monotonic()
    transformer = load_transformer(checkpoint, device=device, dtype=_DTYPES[dtype], precision=precision)
    facts = SamplerFacts(
        fingerprint=component_fingerprint(checkpoint, ["transformer"]),
        drawing_fingerprint=_drawing_fingerprint(checkpoint, precision, dtype, device),
        precision=precision,
        device=device,
        max_pixels=canvas_pixels(transformer),
        pixel_multiple=pixel_multiple(transformer),
    )
    engine = SamplerEngine(
        transformer,
        load_scheduler(checkpoint),
        facts,
        max_adapters=max_adapters,
        compile_backend=compile_backend,
        idle_seconds=idle_seconds,
        on_parked=on_parked,
    )
    seconds = time.monotonic() - started
    logger.info("transformer loaded", extra={"seconds": round(seconds, 3), "device": device})
    return engine, seconds


def _preview_hook(every: int, show: Callable[[LatentPreview], None]) -> PreviewHook | None:
    if not every:
        return None

    def copied(preview: StepPreview) -> None:
        # The copy to the host is the only time that a preview takes from the drawing.
        latents = to_raw(preview.latents.cpu())
        show(LatentPreview(step=preview.step, num_steps=preview.num_steps, timestep=preview.timestep, latents=latents))

    return PreviewHook(every=every, show=copied)


def _conditioning(embeddings: Mapping[str, RawTensor]) -> TextConditioning:
    return collate([{name: from_raw(raw) for name, raw in embeddings.items()}])


def _drawing_fingerprint(checkpoint: Path, precision: str, dtype: str, device: str) -> str:
    record = {
        "weights": component_fingerprint(checkpoint, PARTS),
        "precision": precision,
        "dtype": dtype,
        "device": torch.device(device).type,
        "code": CODE_VERSION,
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgumentError(
            f"device {device!r} cannot be used: {reason}; set it to cpu, or to a device of this machine",
            reason="NO_SUCH_DEVICE",
            metadata={"device": device},
        ) from error


def _out_of_memory(drawing: Drawing) -> ResourceExhaustedError:
    size = f"{drawing.width}x{drawing.height}"
    return ResourceExhaustedError(
        f"the device has too little memory to draw {size}; ask for a smaller picture, or hold the model in int8-quanto",
        reason="OUT_OF_DEVICE_MEMORY",
        metadata={"size": size},
    )
