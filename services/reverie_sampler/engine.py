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
from reverie_common.errors import InvalidArgumentError, ResourceExhaustedError
from reverie_common.storage.tensors import RawTensor
from reverie_hidream.adapters.files import AdapterFileError, load_adapter
from reverie_hidream.adapters.lokr import LokrAdapter
from reverie_hidream.checkpoint import component_fingerprint, require_parts
from reverie_hidream.conditioning import TextConditioning, collate
from reverie_hidream.sampling import draw, initial_noise, load_scheduler
from reverie_hidream.tensor_io import from_raw, to_raw
from reverie_hidream.transformer import canvas_pixels, load_transformer, pixel_multiple

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


class SamplerEngine:
    """Owned by one thread."""

    def __init__(self, transformer: Any, scheduler: Any, facts: SamplerFacts, *, max_adapters: int) -> None:
        """Draw with the base model until there are adapters."""
        self.facts = facts
        self._transformer = transformer
        self._scheduler = scheduler
        self._max_adapters = max_adapters
        self._num_channels = int(transformer.config.in_channels)
        # All are on the model, at strength 0 but for the one that draws: swapping moves no bytes.
        self._adapters: OrderedDict[str, LokrAdapter] = OrderedDict()

    @property
    def adapter_sha256s(self) -> Sequence[str]:
        """Adapters in memory, the most recently used first."""
        return tuple(reversed(self._adapters))

    def add_adapter(self, sha256: str, body: bytes) -> None:
        """Put the adapter of a file on the model. Blocks for milliseconds.

        Raises:
            InvalidArgumentError: it is no LoKr file, or one for another model.
        """
        try:
            adapter = load_adapter(self._transformer, body, strength=0.0)
        except AdapterFileError as error:
            raise InvalidArgumentError(
                f"{error}; use an adapter that was trained on this model", reason="UNUSABLE_ADAPTER"
            ) from error
        self._adapters[sha256] = adapter
        while len(self._adapters) > self._max_adapters:
            _, oldest = self._adapters.popitem(last=False)
            oldest.detach()

    def draw(
        self, drawing: Drawing, *, on_step: Callable[[int, int], None], should_stop: Callable[[], bool]
    ) -> RawTensor:
        """Draw one latent: (1, 16, height / 8, width / 8) float32, scaled. Blocks for all steps.

        Args:
            on_step: called after every step with (steps done, steps in all).
            should_stop: asked before every step.

        Raises:
            SamplingStopped: `should_stop` said so.
            ResourceExhaustedError: the device has too little memory for this size.
        """
        self._select(drawing.adapter_sha256, drawing.adapter_strength)
        try:
            return to_raw(self._draw(drawing, on_step, should_stop))
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(drawing) from error

    def _draw(
        self, drawing: Drawing, on_step: Callable[[int, int], None], should_stop: Callable[[], bool]
    ) -> torch.Tensor:
        return draw(
            self._transformer,
            self._scheduler,
            _conditioning(drawing.positive),
            None if drawing.negative is None else _conditioning(drawing.negative),
            width=drawing.width,
            height=drawing.height,
            num_inference_steps=drawing.num_inference_steps,
            guidance_scale=drawing.guidance_scale,
            noise=initial_noise(drawing.seed, drawing.height, drawing.width, self._num_channels),
            shift=drawing.shift,
            seed=drawing.seed,
            on_step=on_step,
            should_stop=should_stop,
        ).cpu()

    def _select(self, sha256: str | None, strength: float) -> None:
        for name, adapter in self._adapters.items():
            adapter.set_strength(strength if name == sha256 else 0.0)
        if sha256 is not None:
            self._adapters.move_to_end(sha256)


def load_engine(
    checkpoint: Path, *, device: str, dtype: str, precision: str, num_threads: int, max_adapters: int
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
    engine = SamplerEngine(transformer, load_scheduler(checkpoint), facts, max_adapters=max_adapters)
    seconds = time.monotonic() - started
    logger.info("transformer loaded", extra={"seconds": round(seconds, 3), "device": device})
    return engine, seconds


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
