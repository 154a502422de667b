"""The training thread's side of validation: when pictures are due, and handing the adapter over without waiting."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from reverie.common.v1.common_pb2 import ObjectRef
from reverie_common.errors import ReverieError
from reverie_common.storage import OBJECT_MEDIA_TYPE, ObjectStore, put_object
from reverie_common.storage.keys import adapter_snapshot_key

from reverie_trainer.jobs.spec import Validation
from reverie_trainer.worker.control_thread import ControlThread
from reverie_trainer.worker.outbox import Outbox
from reverie_trainer.worker.validation import ValidationQueue, ValidationRound

Crosses = Callable[[int, float], bool]


class Pictures:
    """Asks for pictures; does nothing where the job wants none or there is no sampler."""

    def __init__(
        self,
        validation: Validation | None,
        queue: ValidationQueue | None,
        *,
        max_steps: int,
        store: ObjectStore,
        control: ControlThread,
        outbox: Outbox,
    ) -> None:
        """Start the thread that writes adapters."""
        self._validation = validation if queue is not None else None
        self._queue = queue
        self._max_steps = max_steps
        self._store = store
        self._control = control
        self._outbox = outbox
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")
        self._unwritten: list[ValidationRound] = []

    def ask_base(self) -> None:
        """Ask for the base model's pictures, unless the job does not want them."""
        if self._validation is not None and not self._validation.disable_benchmark:
            self._enqueue(ValidationRound(step=0, adapter=None))

    def is_due(self, step: int, crosses: Crosses | None = None) -> bool:
        """Whether a step's pictures are wanted; always those of the last one.

        Args:
            crosses: whether a step completes another multiple of so many epochs (`EpochClock.crosses`).
        """
        if self._validation is None:
            return False
        every = self._validation.every_steps
        if step == self._max_steps or (every and step % every == 0):
            return True
        return crosses is not None and crosses(step, self._validation.every_epochs)

    def ask(self, step: int, adapter_file: bytes, *, weights: str = "adapter") -> None:
        """Ask for the pictures of a step. The adapter is written, and everything else done, in the background.

        Args:
            weights: `adapter`, or `ema` where the file is the running average.
        """
        sha256 = hashlib.sha256(adapter_file).hexdigest()
        key = adapter_snapshot_key(sha256)
        ref = ObjectRef(
            uri=self._store.uri(key), size_bytes=len(adapter_file), sha256=sha256, media_type=OBJECT_MEDIA_TYPE
        )
        pending = ValidationRound(step=step, adapter=ref, weights=weights)
        self._unwritten.append(pending)
        self._writer.submit(self._write, pending, key, adapter_file)

    def ask_again(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Ask for what an earlier worker did not get any more; records are those of `pending`."""
        if self._queue is not None:
            for record in records:
                self._enqueue(ValidationRound.from_json(record))

    def pending(self) -> list[dict[str, Any]]:
        """What was asked for and is not there yet, as JSON for a checkpoint."""
        queued = self._queue.pending() if self._queue is not None else ()
        rounds = {(waiting.step, waiting.weights): waiting for waiting in (*queued, *self._unwritten)}
        return [rounds[key].to_json() for key in sorted(rounds)]

    def drain(self, patience_seconds: float, should_stop: Callable[[], bool]) -> None:
        """Wait for pictures that are not there yet; see ValidationQueue.drain."""
        self._writer.shutdown(wait=True)
        if self._queue is not None:
            self._control.run(self._queue.drain(patience_seconds, should_stop))

    def close(self) -> None:
        """Ask for nothing more."""
        self._writer.shutdown(wait=True, cancel_futures=True)

    def _write(self, pending: ValidationRound, key: str, body: bytes) -> None:
        try:
            put_object(self._store, key, body)
            self._enqueue(pending)
        except ReverieError as error:
            logging.getLogger(__name__).warning("adapter of step %d was not written: %s", pending.step, error.message)
            self._outbox.warn(
                "VALIDATION_PICTURES_LOST",
                f"no pictures of step {pending.step}: its adapter could not be written: {error.message}",
            )
        finally:
            self._unwritten.remove(pending)

    def _enqueue(self, pending: ValidationRound) -> None:
        if self._queue is not None:
            # Waits for the queue to know it, a millisecond, so that `pending` never misses it.
            self._control.run(self._queue.add(pending))
