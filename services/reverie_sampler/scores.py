"""CLIP scores of finished pictures, in a thread of their own; the model is loaded with the first one."""

import asyncio
import io
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from reverie.common.v1.common_pb2 import ObjectRef
from reverie_common.storage import ObjectStore, get_object
from reverie_hidream.checkpoint import resolve_checkpoint
from reverie_hidream.clip_score import ClipScorer, load_clip_scorer

MAX_REMEMBERED = 1024


class Scores:
    """Scores pictures against prompts. Belongs to one event loop."""

    def __init__(self, *, location: str, device: str, cache_dir: Path | None, store: ObjectStore) -> None:
        """Load nothing yet.

        Args:
            location: of the CLIP model: a directory, an s3:// prefix or a Hub id; empty for no scores.
            device: torch device of the model.
            cache_dir: for models that are not local.
            store: where the pictures are.
        """
        self._location = location
        self._device = device
        self._cache_dir = cache_dir
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="clip")
        self._scorer: ClipScorer | None = None
        self._known: OrderedDict[tuple[str, str], float] = OrderedDict()

    @property
    def location(self) -> str:
        """Where the CLIP model comes from; empty where there is none."""
        return self._location

    def close(self) -> None:
        """Let the running score finish, forget the rest. Safe to repeat."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def score(self, image: ObjectRef, prompt: str) -> float:
        """Score a picture: 0 to 100. The same picture and prompt are computed once.

        Raises:
            ReverieError: the model cannot be loaded, or the picture cannot be read.
        """
        key = (image.sha256, prompt)
        if key not in self._known:
            loop = asyncio.get_running_loop()
            self._known[key] = await loop.run_in_executor(self._thread, self._score, image, prompt)
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        return self._known[key]

    def _score(self, image: ObjectRef, prompt: str) -> float:
        if self._scorer is None:
            found = resolve_checkpoint(self._location, store=self._store, cache_dir=self._cache_dir)
            self._scorer = load_clip_scorer(found, device=self._device)
        return self._scorer.score(Image.open(io.BytesIO(get_object(self._store, image))), prompt)
