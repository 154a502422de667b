"""Which texts a sample is trained with: where they come from and what is done to them (spec 6.2), as pure functions."""

import hashlib
from collections.abc import Sequence
from pathlib import PurePosixPath

from reverie_trainer.jobs.catalog.manifests import Sample
from reverie_trainer.jobs.spec import DatasetChoice

NUM_ORDERS = 8
"""Orders of a caption's parts that caption_shuffle draws from; each is encoded beforehand."""

_SEPARATOR = ","


def captions_of(sample: Sample, choice: DatasetChoice) -> tuple[str, ...]:
    """Return every text that a sample may be shown with, without repetitions; empty where it has none."""
    return tuple(dict.fromkeys(text for orders in caption_orders(sample, choice) for text in orders))


def caption_orders(sample: Sample, choice: DatasetChoice) -> tuple[tuple[str, ...], ...]:
    """Return a sample's captions, of which one is chosen at each visit, each in all orders that it may be shown in."""
    texts = _captions(sample, choice)
    if not choice.caption_shuffle:
        return tuple((text,) for text in texts)
    return tuple(shuffled_orders(text) for text in texts)


def shuffled_orders(caption: str) -> tuple[str, ...]:
    """Return up to NUM_ORDERS orders of the comma-separated parts of a caption, its own first.

    They depend on the caption alone, so that jobs of other seeds find them encoded.
    """
    parts = [part.strip() for part in caption.split(_SEPARATOR) if part.strip()]
    orders = dict.fromkeys([caption])
    if len(parts) < 2:
        return tuple(orders)
    for number in range(1, NUM_ORDERS):
        orders.setdefault(", ".join(_ordered(parts, f"{number}:{caption}")))
    return tuple(orders)


def _ordered(parts: Sequence[str], salt: str) -> list[str]:
    def position(index: int) -> bytes:
        return hashlib.sha256(f"{salt}:{index}".encode()).digest()

    return [parts[index] for index in sorted(range(len(parts)), key=position)]


def instance_prompts_of(choice: DatasetChoice) -> tuple[str, ...]:
    """Return the prompts that stand for a dataset's subject."""
    if choice.instance_prompts:
        return choice.instance_prompts
    return (choice.instance_prompt,) if choice.instance_prompt is not None else ()


def _captions(sample: Sample, choice: DatasetChoice) -> tuple[str, ...]:
    prompts = instance_prompts_of(choice)
    own = _own_captions(sample, choice.caption_strategy)
    if not own:
        return prompts
    if not choice.prepend_instance_prompt:
        return own
    return tuple(f"{prompt} {text}" for prompt in prompts for text in own)


def _own_captions(sample: Sample, strategy: str) -> tuple[str, ...]:
    if strategy == "instanceprompt":
        return ()
    if strategy == "filename":
        text = PurePosixPath(sample.name).stem.replace("_", " ").strip()
        return (text,) if text else ()
    return sample.captions
