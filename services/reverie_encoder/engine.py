"""The text encoders in this process's memory. torch stays behind this module; nothing here knows about requests."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from reverie_common.concurrency import Parkable, Parking
from reverie_common.errors import InvalidArgumentError, ResourceExhaustedError
from reverie_common.storage.tensors import RawTensor
from reverie_hidream.host_copy import HostCopy
from reverie_hidream.tensor_io import dtype_name, to_raw
from reverie_hidream.text import TextEncoder, load_text_encoder

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderPlan:
    """How one encoder is to be loaded."""

    name: str
    checkpoint: Path
    device: str
    dtype: str
    precision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderFacts:
    """What callers may know about a loaded encoder."""

    name: str
    fingerprint: str
    """Hex sha256 over everything that an embedding depends on besides the prompt."""
    precision: str
    device: str
    max_length: int
    shape: tuple[int, ...]
    dtype: str
    """safetensors name, `BF16` or `F32`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCut:
    """How much of a prompt an encoder can read."""

    num_tokens: int
    """Of the whole prompt, special tokens included."""
    dropped_text: str
    """Its end that does not fit; empty when all of it fits."""


class EncoderEngine:
    """Loaded text encoders by name. `encode` of one encoder is for one thread at a time; `measure` for any."""

    def __init__(
        self,
        encoders: Mapping[str, TextEncoder],
        *,
        idle_seconds: float = 0.0,
        on_parked: Callable[[str, bool], None] = lambda *_: None,
        parkable: Callable[[TextEncoder], Parkable] = lambda encoder: HostCopy(encoder.module, encoder.device),
    ) -> None:
        """Take loaded encoders.

        Args:
            idle_seconds: How long an encoder has no work before it waits in host memory; 0 is for ever.
            on_parked: Told an encoder's name and whether it waits in host memory, whenever that changes.
            parkable: How an encoder is moved.
        """
        self._encoders = dict(encoders)
        self.facts = {name: _facts(encoder) for name, encoder in encoders.items()}
        self._parkings = {
            name: Parking(parkable(encoder), idle_seconds=idle_seconds, on_change=partial(on_parked, name))
            for name, encoder in encoders.items()
        }

    def release(self) -> bool:
        """Move every idle encoder to host memory; returns whether all are there. Blocks; for any thread."""
        released = [parking.release() for parking in self._parkings.values()]
        return all(released)

    def close(self) -> None:
        """Park no more by itself. Safe to repeat."""
        for parking in self._parkings.values():
            parking.close()

    def encode(self, name: str, prompts: Sequence[str]) -> list[RawTensor]:
        """Run one encoder over some prompts; one tensor for each, in order. Blocks.

        Raises:
            ResourceExhaustedError: the device has too little memory for these prompts at once.
        """
        try:
            with self._parkings[name].in_use():
                return [to_raw(encoded.tensor) for encoded in self._encoders[name].encode(prompts)]
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(name, len(prompts)) from error

    def measure(self, name: str, prompt: str) -> PromptCut:
        """Count a prompt's tokens without running the model. Blocks for a millisecond."""
        num_tokens, dropped_text = self._encoders[name].measure(prompt)
        return PromptCut(num_tokens=num_tokens, dropped_text=dropped_text)


def load_engine(
    plans: Sequence[EncoderPlan],
    *,
    num_threads: int,
    on_loaded: Callable[[str, float], None],
    idle_seconds: float = 0.0,
    on_parked: Callable[[str, bool], None] = lambda *_: None,
) -> EncoderEngine:
    """Load encoders one after the other, so that host memory holds one unquantised encoder at a time. Blocks.

    Args:
        plans: What to load.
        num_threads: torch threads of this process.
        on_loaded: Called with each encoder's name and the seconds that it took.
        idle_seconds, on_parked: See EncoderEngine.

    Raises:
        NotFoundError: a part of the checkpoint is missing; names it and the remedy.
        InvalidArgumentError: this machine has no such device.
    """
    torch.set_num_threads(num_threads)
    for plan in plans:
        _require_device(plan.name, plan.device)
    encoders: dict[str, TextEncoder] = {}
    for plan in plans:
        started = time.monotonic()
        encoders[plan.name] = _load(plan)
        seconds = time.monotonic() - started
        on_loaded(plan.name, seconds)
        logger.info("encoder %s loaded", plan.name, extra={"seconds": round(seconds, 3), "device": plan.device})
    return EncoderEngine(encoders, idle_seconds=idle_seconds, on_parked=on_parked)


def _require_device(name: str, device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        message = f"device {device!r} of {name} cannot be used: {reason}; set it to cpu, or to a device of this machine"
        raise InvalidArgumentError(message, reason="NO_SUCH_DEVICE", metadata={"device": device}) from error


def _load(plan: EncoderPlan) -> TextEncoder:
    return load_text_encoder(
        plan.checkpoint, plan.name, device=plan.device, dtype=_DTYPES[plan.dtype], precision=plan.precision
    )


def _facts(encoder: TextEncoder) -> EncoderFacts:
    return EncoderFacts(
        name=encoder.name,
        fingerprint=encoder.fingerprint,
        precision=encoder.precision,
        device=str(encoder.device),
        max_length=encoder.max_length,
        shape=encoder.shape,
        dtype=dtype_name(encoder.dtype),
    )


def _out_of_memory(name: str, num_prompts: int) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"encoder {name} ran out of device memory with {num_prompts} prompts; lower max_batch_size of the encoder"
        " service, or try again when the device is less busy",
        reason="OUT_OF_DEVICE_MEMORY",
        metadata={"encoder": name, "num_prompts": str(num_prompts)},
        retry_after_seconds=10.0,
    )
