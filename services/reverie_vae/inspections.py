"""What was found in image files, remembered in the store: opening ten thousand photographs takes minutes."""

import asyncio
import json
from concurrent.futures import Executor
from dataclasses import asdict

from reverie_common.concurrency import SingleFlight
from reverie_common.errors import IntegrityError, ObjectNotFoundError
from reverie_common.storage import JSON_MEDIA_TYPE, ObjectStore
from reverie_common.storage.keys import inspection_key

from reverie_vae.files import ImageFile, ImageSources, fetch_image, require_stored
from reverie_vae.images import INSPECTION_VERSION, ImageDescription, inspect_image, refuse_many_pixels
from reverie_vae.metrics import STAGE_SECONDS

_MAX_RECORD_BYTES = 4096


class Inspections:
    """Opens image files once. Belongs to one event loop.

    Args:
        store: Where the findings go.
        sources: Where the files are.
        decoders: Where files are fetched and decoded.
        max_pixels: Images over this many pixels are rejected.
    """

    def __init__(self, *, store: ObjectStore, sources: ImageSources, decoders: Executor, max_pixels: int) -> None:
        self._store = store
        self._sources = sources
        self._decoders = decoders
        self._max_pixels = max_pixels
        self._flights: SingleFlight[ImageFile, ImageDescription] = SingleFlight()

    async def inspect(self, file: ImageFile) -> ImageDescription:
        """Describe one file; decodes it if nobody did before. Safe to repeat.

        Raises:
            ImageRejectedError: it cannot be used. Never remembered: a missing file may be uploaded, a limit raised.
            StoreUnavailableError: the store cannot be read or written.
        """
        description, _ = await self._flights.run(file, lambda: self._find_or_open(file))
        return description

    async def _find_or_open(self, file: ImageFile) -> ImageDescription:
        known = await asyncio.to_thread(self._remembered, file)
        if known is not None:
            return known
        return await asyncio.get_running_loop().run_in_executor(self._decoders, self._open, file)

    def _remembered(self, file: ImageFile) -> ImageDescription | None:
        require_stored(self._sources.store_of(file), file)
        key = inspection_key(file.sha256, str(INSPECTION_VERSION))
        try:
            body = self._store.get(key, max_size_bytes=_MAX_RECORD_BYTES)
        except ObjectNotFoundError:
            return None
        description = _from_json(key, body)
        refuse_many_pixels(description.width, description.height, self._max_pixels)
        return description

    def _open(self, file: ImageFile) -> ImageDescription:
        with STAGE_SECONDS.labels("read").time():
            description = inspect_image(fetch_image(self._sources.store_of(file), file), max_pixels=self._max_pixels)
        body = json.dumps(asdict(description), sort_keys=True).encode()
        self._store.create(inspection_key(file.sha256, str(INSPECTION_VERSION)), body, media_type=JSON_MEDIA_TYPE)
        return description


def _from_json(key: str, body: bytes) -> ImageDescription:
    try:
        return ImageDescription(**json.loads(body))
    except (ValueError, TypeError) as error:
        message = f"object {key} is not an inspection: {error}; delete it and let it be made again"
        raise IntegrityError(message, metadata={"key": key}) from error
