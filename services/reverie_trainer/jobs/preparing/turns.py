"""Encoders and VAE that share a card take turns (`memory.offload_during_startup`)."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from reverie_trainer.jobs.preparing.patience import Notice, Patience, patiently

Prompts = TypeVar("Prompts")
Pictures = TypeVar("Pictures")


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """A service that may have the card."""

    release: Callable[[], Awaitable[bool]]
    patience: Patience
    address: str


async def in_turns(
    encode_prompts: Callable[[], Awaitable[Prompts]],
    encode_pictures: Callable[[], Awaitable[Pictures]],
    *,
    encoders: Sequence[Neighbour],
    vae: Neighbour,
    notice: Notice,
) -> tuple[Prompts, Pictures]:
    """Encode all prompts, then all pictures, each with the other's models in host memory.

    Raises:
        JobFailedError: a service was away for longer than allowed.
    """
    await release([vae], notice)
    prompts = await encode_prompts()
    await release(encoders, notice)
    return prompts, await encode_pictures()


async def release(neighbours: Sequence[Neighbour], notice: Notice) -> None:
    """Have services move their models to host memory; one that works for somebody else is told about, not waited for.

    Raises:
        JobFailedError: a service was away for longer than allowed.
    """
    busy = [each.address for each in neighbours if not await patiently(each.release, each.patience)]
    if busy:
        await notice(
            "MEMORY_IN_USE",
            f"the models at {', '.join(busy)} stay on their device, because other requests use them; where the next "
            "step runs out of memory there, resume the job when they are done",
        )
