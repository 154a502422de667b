"""Previews: scaled latents through the tiny decoder, in a thread of their own, so that no image waits for them."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from reverie.common.v1.common_pb2 import ObjectRef, TensorRef
from reverie_common.errors import FailedPreconditionError, NotFoundError
from reverie_common.storage import ObjectStore, RawTensor, get_tensor
from reverie_hidream.checkpoint import resolve_checkpoint
from reverie_hidream.tensor_io import from_raw
from reverie_hidream.tiny_decoder import (
    HUB_ID,
    TinyDecoder,
    decoder_directory,
    decoder_fingerprint,
    load_tiny_decoder,
)

from reverie_vae.engine import VaeFacts
from reverie_vae.latents import picture_key, put_png

NO_DECODER = "none"


def find_decoder(setting: str, checkpoint: Path) -> str:
    """Where the tiny decoder is: what the setting says, else the checkpoint's, else taef1; empty for no previews.

    Raises:
        NotFoundError: the setting names a directory without one.
    """
    if setting == NO_DECODER:
        return ""
    if setting:
        if Path(setting).expanduser().is_dir():
            decoder_directory(Path(setting).expanduser())
        return setting
    try:
        return str(decoder_directory(checkpoint))
    except NotFoundError:
        return HUB_ID


class Previews:
    """Makes previews. The decoder is found at once where it is local, and loaded with the first preview."""

    def __init__(
        self,
        *,
        location: str,
        cache_dir: Path | None,
        store: ObjectStore,
        decoders: ThreadPoolExecutor,
        facts: VaeFacts,
    ) -> None:
        """Load nothing yet.

        Args:
            location: what `find_decoder` found.
            cache_dir: for decoders that are not local.
            store: where latents are and pictures go.
            decoders: where PNG files are written.
            facts: of the VAE whose latents these are.
        """
        self._location = location
        self._cache_dir = cache_dir
        self._store = store
        self._decoders = decoders
        self._facts = facts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="preview")
        self._decoder: TinyDecoder | None = None
        local = Path(location).expanduser() if location else None
        is_local = local is not None and local.is_dir()
        self._fingerprint = decoder_fingerprint(decoder_directory(local)) if is_local and local is not None else ""

    @property
    def location(self) -> str:
        """Where the decoder comes from; empty where there is none."""
        return self._location

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the decoder; empty while it is not known."""
        return self._fingerprint

    async def close(self) -> None:
        """Finish what runs. Safe to repeat."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    async def decode(self, latents: TensorRef) -> list[ObjectRef]:
        """Write one small PNG for each of (N, 16, h, w) scaled latents, in order. Safe to repeat.

        Raises:
            FailedPreconditionError: this service has no tiny decoder.
            NotFoundError, UnavailableError: the decoder is not where the setting says.
            ObjectNotFoundError, IntegrityError: the latents are not in the store, or damaged.
        """
        if not self._location:
            raise FailedPreconditionError(
                "this VAE service draws no previews; start it with --preview-decoder",
                reason="NO_PREVIEW_DECODER",
            )
        raw = await asyncio.to_thread(get_tensor, self._store, latents)
        loop = asyncio.get_running_loop()
        pictures = await loop.run_in_executor(self._thread, self._decode, raw)
        writes = [
            loop.run_in_executor(
                self._decoders, put_png, self._store, picture_key(latents.sha256, index, self._fingerprint), picture
            )
            for index, picture in enumerate(pictures)
        ]
        return list(await asyncio.gather(*writes))

    def _decode(self, latents: RawTensor) -> Sequence[np.ndarray]:
        if self._decoder is None:
            self._decoder = self._load()
            self._fingerprint = self._decoder.fingerprint
        # A step that diverged shows as black; the picture itself is refused by DecodeLatents.
        return list(self._decoder.decode(from_raw(latents).nan_to_num()).numpy())

    def _load(self) -> TinyDecoder:
        found = resolve_checkpoint(self._location, store=self._store, cache_dir=self._cache_dir)
        return load_tiny_decoder(
            decoder_directory(found), latent_channels=self._facts.latent_channels, device=self._facts.device
        )
