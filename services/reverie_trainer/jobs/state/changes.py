"""Who waits for news of a job is woken here; within one process, on its event loop."""

import asyncio


class Changes:
    """One-shot signals by job, and one for any job."""

    def __init__(self) -> None:
        self.is_closed = False
        self._signals: dict[str, asyncio.Event] = {}
        self._any = asyncio.Event()

    def signal(self, job_id: str) -> asyncio.Event:
        """Return the event that is set by the next announcement for a job.

        Take it before you read: then no change between reading and waiting is missed.
        """
        return self._signals.setdefault(job_id, asyncio.Event())

    def any_signal(self) -> asyncio.Event:
        """Return the event that is set by the next announcement for any job."""
        return self._any

    def announce(self, job_id: str) -> None:
        """Wake everybody who waits for the job."""
        self.announce_any()
        signal = self._signals.pop(job_id, None)
        if signal is not None:
            signal.set()

    def announce_any(self) -> None:
        """Wake everybody who waits for any job."""
        self._any.set()
        self._any = asyncio.Event()

    def close(self) -> None:
        """Wake everybody for the last time: this process stops."""
        self.is_closed = True
        for job_id in list(self._signals):
            self.announce(job_id)


async def wait_for(signal: asyncio.Event, timeout_seconds: float) -> bool:
    """Wait for a signal at most so long; True when it came."""
    try:
        # Not asyncio.wait_for, which in Python 3.11 swallows a cancellation that comes together with the signal.
        async with asyncio.timeout(timeout_seconds):
            await signal.wait()
    except TimeoutError:
        return False
    return True
