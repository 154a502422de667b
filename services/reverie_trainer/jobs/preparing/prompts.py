"""Which address encodes with what, and having prompts encoded by all of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reverie.common.v1 import common_pb2
from reverie.encoder.v1 import encoder_pb2
from reverie.training.v1 import job_pb2

from reverie_trainer.jobs.preparing.patience import Notice, Patience, ask_in_chunks, patiently, together
from reverie_trainer.jobs.preparing.progress import StageProgress
from reverie_trainer.jobs.preparing.services import ENCODER_NAMES, EncoderClient
from reverie_trainer.jobs.running.failures import JobFailedError

_CHUNK = 16
_PARALLEL = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderHost:
    """One address and the encoders that it is asked for."""

    client: EncoderClient
    descriptions: tuple[encoder_pb2.EncoderDescription, ...]
    patience: Patience


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderPlan:
    """Who encodes what; every encoder of HiDream is there once."""

    hosts: tuple[EncoderHost, ...]

    @property
    def descriptions(self) -> dict[str, encoder_pb2.EncoderDescription]:
        """What is known of each encoder, by name."""
        return {ENCODER_NAMES[item.encoder]: item for host in self.hosts for item in host.descriptions}

    @property
    def fingerprints(self) -> dict[str, str]:
        """What each encoder's embeddings depend on besides the prompt, by name."""
        return {name: item.fingerprint for name, item in self.descriptions.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """An encoder saw only the beginning of a prompt."""

    encoder: str
    num_tokens: int
    max_length: int
    dropped_text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompts:
    """Embeddings of prompts."""

    embeddings: Mapping[str, Mapping[str, common_pb2.TensorRef]]
    """By prompt and by name of the encoder."""
    cuts: Mapping[str, Sequence[Cut]]
    """By prompt, only prompts that were cut."""
    num_cached: int
    """Prompts of which every embedding was in the store before."""

    def errors(self) -> list[job_pb2.EmbeddingError]:
        """Return what storing changed, over all prompts, for each encoder of which it changed anything."""
        by_encoder: dict[str, list[float]] = {}
        for references in self.embeddings.values():
            for name, reference in references.items():
                by_encoder.setdefault(name, []).append(reference.relative_error)
        return [
            job_pb2.EmbeddingError(encoder=name, mean=math.fsum(errors) / len(errors), max=max(errors))
            for name, errors in sorted(by_encoder.items())
            if any(errors)
        ]


@dataclass(kw_only=True, slots=True)
class _Collector:
    """Brings together what several addresses say about one prompt."""

    num_encoders: int
    progress: StageProgress
    embeddings: dict[str, dict[str, common_pb2.TensorRef]] = field(default_factory=dict)
    cuts: dict[str, list[Cut]] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)

    async def add(self, prompt: str, host: EncoderHost, response: encoder_pb2.EncodePromptsResponse) -> None:
        lengths = {item.encoder: item.max_length for item in host.descriptions}
        found = self.embeddings.setdefault(prompt, {})
        for embedding in response.embeddings:
            name = ENCODER_NAMES[embedding.encoder]
            found[name] = embedding.tensor
            if not embedding.cached:
                self.fresh.add(prompt)
            if embedding.dropped_text:
                cut = Cut(
                    encoder=name,
                    num_tokens=embedding.num_tokens,
                    max_length=lengths[embedding.encoder],
                    dropped_text=embedding.dropped_text,
                )
                self.cuts.setdefault(prompt, []).append(cut)
        if len(found) == self.num_encoders:
            await self.progress.advance(cached=prompt not in self.fresh)


async def plan_encoders(clients: Sequence[EncoderClient], patience_seconds: float, notice: Notice) -> EncoderPlan:
    """Ask every address what it holds and decide who encodes what; the first that holds an encoder is asked for it.

    Raises:
        JobFailedError: an encoder is nowhere, or an address was away for too long.
    """
    hosts = []
    taken: set[int] = set()
    for client in clients:
        patience = Patience(f"the encoder service at {client.address}", patience_seconds, notice)
        described = await patiently(client.describe, patience)
        own = tuple(item for item in described if item.encoder in ENCODER_NAMES and item.encoder not in taken)
        taken.update(item.encoder for item in own)
        if own:
            hosts.append(EncoderHost(client=client, descriptions=own, patience=patience))
    missing = [name for encoder, name in ENCODER_NAMES.items() if encoder not in taken]
    if missing:
        addresses = ", ".join(client.address for client in clients)
        raise JobFailedError(
            "ENCODER_MISSING",
            f"no encoder service holds {', '.join(missing)}; asked: {addresses}",
            f"Start one with --encoders {','.join(missing)} and add its address to the trainer's --encoders, then "
            "resume the job.",
        )
    return EncoderPlan(hosts=tuple(hosts))


async def encode_prompts(
    prompts: Sequence[str], plan: EncoderPlan, progress: StageProgress, storage: str = "exact"
) -> EncodedPrompts:
    """Have distinct prompts encoded by every encoder, kept as `storage` says; waits while an address is away.

    Raises:
        JobFailedError: an address was away for too long.
        ReverieError: a prompt was refused.
    """
    collector = _Collector(num_encoders=len(plan.descriptions), progress=progress)
    await progress.begin()
    await together(*(_encode_at(host, prompts, collector, storage) for host in plan.hosts))
    return EncodedPrompts(
        embeddings=collector.embeddings, cuts=collector.cuts, num_cached=len(set(prompts) - collector.fresh)
    )


async def _encode_at(host: EncoderHost, prompts: Sequence[str], collector: _Collector, storage: str) -> None:
    encoders = [item.encoder for item in host.descriptions]

    async def on_answer(index: int, response: encoder_pb2.EncodePromptsResponse) -> None:
        await collector.add(prompts[index], host, response)

    await ask_in_chunks(
        prompts,
        lambda part: host.client.encode(part, encoders, storage),
        on_answer,
        patience=host.patience,
        chunk_size=_CHUNK,
        num_parallel=_PARALLEL,
    )
