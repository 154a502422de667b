"""The VAE in this process's memory. torch stays behind this module; nothing here knows about requests."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from reverie_common.concurrency import Parkable, Parking
from reverie_common.errors import InvalidArgumentError, ResourceExhaustedError
from reverie_common.storage.tensors import RawTensor
from reverie_hidream.host_copy import HostCopy
from reverie_hidream.tensor_io import from_raw, to_raw
from reverie_hidream.vae import Vae, load_vae

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeFacts:
    """What callers may know about the loaded VAE."""

    fingerprint: str
    """Hex sha256 over everything that latents depend on besides the pixels."""
    device: str
    dtype: str
    scaling_factor: float
    shift_factor: float
    latent_channels: int
    downsampling: int
    """Pixels per latent pixel in each direction."""


class VaeEngine:
    """A loaded VAE. For one thread at a time."""

    def __init__(
        self,
        vae: Vae,
        *,
        idle_seconds: float = 0.0,
        on_parked: Callable[[bool], None] = lambda _: None,
        parkable: Callable[[Vae], Parkable] = lambda vae: HostCopy(vae.model, vae.device),
    ) -> None:
        """Take a loaded VAE.

        Args:
            idle_seconds: How long it has no work before it waits in host memory; 0 is for ever.
            on_parked: Told whether it waits in host memory, whenever that changes.
            parkable: How it is moved.
        """
        self._vae = vae
        self._parking = Parking(parkable(vae), idle_seconds=idle_seconds, on_change=on_parked)
        self.facts = VaeFacts(
            fingerprint=vae.fingerprint,
            device=str(vae.device),
            dtype=str(vae.dtype).removeprefix("torch."),
            scaling_factor=vae.scaling_factor,
            shift_factor=vae.shift_factor,
            latent_channels=vae.latent_channels,
            downsampling=vae.downsampling,
        )

    def release(self) -> bool:
        """Move the VAE to host memory if it is idle; returns whether it is there. Blocks; for any thread."""
        return self._parking.release()

    def close(self) -> None:
        """Park no more by itself. Safe to repeat."""
        self._parking.close()

    def encode(self, images: Sequence[torch.Tensor]) -> list[RawTensor]:
        """Encode images of one size; one posterior for each, in order. Blocks.

        Args:
            images: (3, height, width) uint8 RGB each.

        Returns:
            (2, 16, height/8, width/8) float32 each: scaled mean and standard deviation.

        Raises:
            ResourceExhaustedError: the device has too little memory.
        """
        pixels = torch.stack(list(images)).to(torch.float32) / 127.5 - 1
        try:
            with self._parking.in_use():
                moments = self._vae.encode(pixels)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(tuple(pixels.shape)) from error
        return [to_raw(one) for one in moments]

    def decode(self, latents: RawTensor) -> list[np.ndarray]:
        """Decode (N, 16, h, w) scaled latents to N pictures (8h, 8w, 3) uint8. Blocks.

        Raises:
            InvalidArgumentError: the latents hold NaN or infinity.
            ResourceExhaustedError: the device has too little memory.
        """
        tensor = from_raw(latents).to(torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidArgumentError(
                "the latents hold NaN or infinity; the sampling run diverged, lower its guidance or the adapter's"
                " learning rate",
                reason="NON_FINITE_LATENTS",
            )
        try:
            with self._parking.in_use():
                return list(self._vae.decode(tensor).numpy())
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(latents.shape) from error


def load_engine(
    checkpoint: Path,
    *,
    device: str,
    dtype: str,
    num_threads: int,
    idle_seconds: float = 0.0,
    on_parked: Callable[[bool], None] = lambda _: None,
) -> tuple[VaeEngine, float]:
    """Load the VAE of a local checkpoint; also say how many seconds it took. Blocks.

    Args:
        idle_seconds, on_parked: See VaeEngine.

    Raises:
        NotFoundError: the checkpoint has no vae/.
        InvalidArgumentError: this machine has no such device.
    """
    torch.set_num_threads(num_threads)
    _require_device(device)
    started = time.monotonic()
    vae = load_vae(checkpoint, device=device, dtype=_DTYPES[dtype])
    engine = VaeEngine(vae, idle_seconds=idle_seconds, on_parked=on_parked)
    seconds = time.monotonic() - started
    logger.info("VAE loaded", extra={"seconds": round(seconds, 3), "device": device})
    return engine, seconds


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        message = f"device {device!r} cannot be used: {reason}; set device to cpu, or to a device of this machine"
        raise InvalidArgumentError(message, reason="NO_SUCH_DEVICE", metadata={"device": device}) from error


def _out_of_memory(shape: tuple[int, ...]) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        f"the VAE ran out of device memory with a batch of shape {shape}; lower max_batch_size of the VAE service, or"
        " try again when the device is less busy",
        reason="OUT_OF_DEVICE_MEMORY",
        metadata={"shape": str(shape)},
        retry_after_seconds=10.0,
    )
