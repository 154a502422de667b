"""Preparing a job's data: open the images, plan their buckets, have prompts and images encoded, write the manifest.

Nothing here holds what matters: every step may be repeated, and everything that was made before is found in the store.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from reverie.common.v1 import common_pb2
from reverie.training.v1 import job_pb2
from reverie.vae.v1 import vae_pb2
from reverie_common.storage import ObjectStore

from reverie_trainer.jobs.admission.encoder_requirements import require_precisions
from reverie_trainer.jobs.catalog.datasets import Datasets
from reverie_trainer.jobs.catalog.manifests import Sample
from reverie_trainer.jobs.preparing.buckets import (
    EMPTY_REMEDY,
    EVALUATION,
    UNDERFILLED_REMEDY,
    Bucket,
    count_buckets,
    describe_empty,
    describe_underfilled,
    scheduled_buckets,
    with_max_steps,
)
from reverie_trainer.jobs.preparing.captions import caption_orders, captions_of
from reverie_trainer.jobs.preparing.geometry import ImagePlan, ImageSize, LeftOut, plan_choice
from reverie_trainer.jobs.preparing.inspection import ImageInspector
from reverie_trainer.jobs.preparing.patience import Notice, Patience, ask_in_chunks, both, patiently
from reverie_trainer.jobs.preparing.prepared import (
    Prepared,
    PreparedSample,
    bucket_reports,
    load_prepared,
    prepared_digest,
    save_prepared,
)
from reverie_trainer.jobs.preparing.progress import OnProgress, StageProgress
from reverie_trainer.jobs.preparing.prompts import EncodedPrompts, EncoderPlan, encode_prompts, plan_encoders
from reverie_trainer.jobs.preparing.services import PlannedImage, Services
from reverie_trainer.jobs.preparing.turns import Neighbour, in_turns, release
from reverie_trainer.jobs.running.failures import JobFailedError
from reverie_trainer.jobs.spec import DatasetChoice, JobSpec

Result = TypeVar("Result")

_IMAGE_CHUNK = 16
_IMAGE_PARALLEL = 4

# The report travels with every GetTrainingJob; what goes beyond is told as a number in a notice.
MAX_REJECTED = 200
MAX_TRUNCATED = 100
_MAX_DROPPED_CHARACTERS = 300
_MAX_NAMED = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparationTask:
    """What is to be prepared, and who is told."""

    spec: JobSpec
    dataset_versions: Mapping[str, str]
    on_progress: OnProgress
    notice: Notice


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparationResult:
    """What the worker reads, and what people are told."""

    manifest: common_pb2.ObjectRef
    report: job_pb2.PreparationReport
    max_steps: int
    """Optimiser steps of the job, whether it was given in steps or in epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A sample of one of the job's datasets, with what is known of it so far."""

    choice: int
    """Index of its dataset in the job."""
    sample: Sample
    captions: tuple[str, ...]
    size: tuple[int, int] | None = None
    plan: ImagePlan | None = None
    latents: common_pb2.TensorRef | None = None
    mask: common_pb2.TensorRef | None = None


@dataclass(kw_only=True, slots=True)
class _Rejections:
    """Samples that cannot be used."""

    items: list[job_pb2.RejectedSample] = field(default_factory=list)
    by_choice: dict[int, int] = field(default_factory=dict)

    def add(self, candidate: _Candidate, dataset: str, message: str) -> None:
        self.by_choice[candidate.choice] = self.by_choice.get(candidate.choice, 0) + 1
        self.items.append(job_pb2.RejectedSample(dataset=dataset, sample=candidate.sample.name, message=message))

    def of(self, dataset: str) -> list[job_pb2.RejectedSample]:
        return [item for item in self.items if item.dataset == dataset]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparer:
    """Prepares jobs with the services and the store of this trainer."""

    services: Services
    datasets: Datasets
    store: ObjectStore
    max_pixels: int
    """The checkpoint's canvas."""
    patience_seconds: float
    """How long a service may be away before a job fails."""
    progress_seconds: float
    """Progress is told at most this often."""

    async def prepare(self, task: PreparationTask) -> PreparationResult:
        """Prepare a job's data; may be cancelled and repeated at any moment.

        Raises:
            JobFailedError: the data cannot be trained on, or a service was away for too long.
            ReverieError: a service or the store refused something.
        """
        return await _Preparation(self, task).run()


class _Preparation:
    """The preparation of one job."""

    def __init__(self, preparer: Preparer, task: PreparationTask) -> None:
        self._preparer = preparer
        self._services = preparer.services
        self._store = preparer.store
        self._task = task
        self._spec = task.spec
        self._rejections = _Rejections()
        self._num_images_cached = 0
        self._vae_patience = self._patience(f"the vae service at {preparer.services.vae.address}")
        self._store_patience = self._patience("the object store")

    async def run(self) -> PreparationResult:
        encoders = await plan_encoders(self._services.encoders, self._preparer.patience_seconds, self._task.notice)
        require_precisions(self._spec.model.text_encoder_precision, encoders.descriptions.values())
        vae = await patiently(self._services.vae.describe, self._vae_patience)
        digest = prepared_digest(
            self._spec,
            self._task.dataset_versions,
            encoder_fingerprints=encoders.fingerprints,
            vae_fingerprint=vae.fingerprint,
            max_pixels=self._preparer.max_pixels,
        )
        manifest = await self._in_store(lambda: load_prepared(self._store, digest))
        if manifest is None:
            prepared = await self._prepare_anew(encoders)
            manifest = await self._in_store(lambda: save_prepared(self._store, digest, prepared))
        require_batches(self._spec, manifest.buckets)
        if self._spec.memory.offload_during_startup:
            # The worker's turn.
            await release([*_encoder_neighbours(encoders), self._vae_neighbour()], self._task.notice)
        await self._tell_errors(manifest.report)
        report = job_pb2.PreparationReport()
        report.CopyFrom(manifest.report)
        if self._spec.embedding_storage == "on_demand":
            # Only the empty caption was asked for; the worker asks for the others.
            report.num_prompts_cached = min(report.num_prompts_cached, 1)
        # A manifest is shared by jobs of other batches, which oversubscription fills otherwise.
        scheduled = scheduled_buckets(manifest.buckets, self._spec)
        report.samples_per_epoch = sum(bucket.num_samples for bucket in scheduled)
        max_steps = with_max_steps(self._spec, manifest.buckets).optimization.max_steps
        return PreparationResult(manifest=manifest.reference, report=report, max_steps=max_steps)

    async def _prepare_anew(self, encoders: EncoderPlan) -> Prepared:
        inspected = await self._inspect(await self._load_candidates())
        self._require_images(inspected)
        planned = self._plan(inspected)
        require_batches(self._spec, _buckets_of(self._spec, planned))
        prompts = sorted({"", *(caption for item in planned for caption in item.captions)})
        is_later = self._spec.embedding_storage == "on_demand"
        # The empty caption is needed for the whole job.
        wanted, storage = ([""], "exact") if is_later else (prompts, self._spec.embedding_storage)
        encoded, usable = await self._encode(
            lambda: encode_prompts(wanted, encoders, self._progress("encode_prompts", len(wanted)), storage),
            lambda: self._encode_pictures(planned),
            encoders,
        )
        self._require_images(usable)
        report = self._report(usable, encoded, len(prompts))
        await self._tell_losses(report, encoded)
        return Prepared(
            choices=self._spec.datasets,
            samples=tuple(_prepared_sample(item, self._spec.datasets[item.choice]) for item in usable),
            embeddings=encoded.embeddings,
            encoders=encoders.fingerprints,
            buckets=tuple(_buckets_of(self._spec, usable)),
            report=report,
        )

    async def _encode(
        self,
        prompts: Callable[[], Coroutine[Any, Any, EncodedPrompts]],
        pictures: Callable[[], Coroutine[Any, Any, list[_Candidate]]],
        encoders: EncoderPlan,
    ) -> tuple[EncodedPrompts, list[_Candidate]]:
        if not self._spec.memory.offload_during_startup:
            return await both(prompts(), pictures())
        hosts = _encoder_neighbours(encoders)
        return await in_turns(prompts, pictures, encoders=hosts, vae=self._vae_neighbour(), notice=self._task.notice)

    def _vae_neighbour(self) -> Neighbour:
        vae = self._services.vae
        return Neighbour(release=vae.release, patience=self._vae_patience, address=vae.address)

    async def _load_candidates(self) -> list[_Candidate]:
        candidates = []
        for index, choice in enumerate(self._spec.datasets):
            version = self._task.dataset_versions[choice.dataset]
            manifest = await patiently(
                lambda name=choice.dataset, version=version: self._preparer.datasets.load(name, version),  # type: ignore[misc]  # mypy cannot infer a lambda with defaults
                self._store_patience,
            )
            candidates += [
                _Candidate(choice=index, sample=sample, captions=captions_of(sample, choice))
                for sample in manifest.samples
            ]
        return candidates

    async def _inspect(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        sizes: dict[int, tuple[int, int]] = {}
        progress = self._progress("inspect", len(candidates))

        async def on_inspected(index: int, response: vae_pb2.InspectImagesResponse) -> None:
            if response.HasField("rejection"):
                self._reject(candidates[index], response.rejection.message)
            else:
                sizes[index] = (response.image.width, response.image.height)
            await progress.advance()

        await progress.begin()
        inspector = ImageInspector(self._services.vae, self._preparer.patience_seconds)
        await inspector.inspect([item.sample.image for item in candidates], on_inspected, self._task.notice)
        return [replace(item, size=sizes[index]) for index, item in enumerate(candidates) if index in sizes]

    def _plan(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        planned = []
        for index, choice in enumerate(self._spec.datasets):
            own = [item for item in candidates if item.choice == index]
            plans = plan_choice([_image_size(item) for item in own], choice, self._spec, self._preparer.max_pixels)
            for item, plan in zip(own, plans, strict=True):
                if isinstance(plan, ImagePlan):
                    planned.append(replace(item, plan=plan))
                elif isinstance(plan, LeftOut):
                    self._reject(item, plan.message)
        return planned

    async def _encode_pictures(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        return await self._encode_masks(await self._encode_images(candidates))

    async def _encode_images(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        latents: dict[int, common_pb2.TensorRef] = {}
        progress = self._progress("encode_images", len(candidates))

        async def on_encoded(index: int, response: vae_pb2.EncodeImagesResponse) -> None:
            if response.HasField("rejection"):
                self._reject(candidates[index], response.rejection.message)
            else:
                latents[index] = response.moments.tensor
                self._num_images_cached += response.cached and not self._is_evaluation(candidates[index])
            await progress.advance(cached=response.cached)

        await progress.begin()
        await ask_in_chunks(
            [_planned_image(item, item.sample.image) for item in candidates],
            self._services.vae.encode,
            on_encoded,
            patience=self._vae_patience,
            chunk_size=_IMAGE_CHUNK,
            num_parallel=_IMAGE_PARALLEL,
        )
        return [replace(item, latents=latents[index]) for index, item in enumerate(candidates) if index in latents]

    async def _encode_masks(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Return the candidates with their masks; one whose mask cannot be used is left out."""
        files = {index: item.sample.mask for index, item in enumerate(candidates) if self._needs_mask(item)}
        masks: dict[int, common_pb2.TensorRef] = {}
        order = list(files)
        if not order:
            return list(candidates)
        progress = self._progress("encode_masks", len(order))

        async def on_encoded(position: int, response: vae_pb2.EncodeMasksResponse) -> None:
            if response.HasField("rejection"):
                self._reject(candidates[order[position]], f"its mask: {response.rejection.message}")
            else:
                masks[order[position]] = response.mask
            await progress.advance(cached=response.cached)

        await progress.begin()
        await ask_in_chunks(
            [_planned_image(candidates[index], files[index]) for index in order],
            self._services.vae.encode_masks,
            on_encoded,
            patience=self._vae_patience,
            chunk_size=_IMAGE_CHUNK,
            num_parallel=_IMAGE_PARALLEL,
        )
        return [
            replace(item, mask=masks.get(index))
            for index, item in enumerate(candidates)
            if index not in files or index in masks
        ]

    def _needs_mask(self, candidate: _Candidate) -> bool:
        return self._spec.datasets[candidate.choice].mask_type != "none" and candidate.sample.mask is not None

    def _is_evaluation(self, candidate: _Candidate) -> bool:
        return self._spec.datasets[candidate.choice].role == EVALUATION

    def _reject(self, candidate: _Candidate, message: str) -> None:
        self._rejections.add(candidate, self._spec.datasets[candidate.choice].dataset, message)

    def _require_images(self, candidates: Sequence[_Candidate]) -> None:
        """Refuse a dataset of which nothing is left, with what was wrong with its first images by name."""
        used = {item.choice for item in candidates}
        for index, choice in enumerate(self._spec.datasets):
            if index not in used:
                message = describe_empty(choice.dataset, self._rejections.by_choice.get(index, 0))
                rejected = sorted((each.sample, each.message) for each in self._rejections.of(choice.dataset))
                why = "".join(f"; {sample}: {reason}" for sample, reason in rejected[:_MAX_NAMED])
                more = f"; and {len(rejected) - _MAX_NAMED} more" if len(rejected) > _MAX_NAMED else ""
                raise JobFailedError("DATASET_EMPTY", message + why + more, EMPTY_REMEDY)

    def _report(
        self, candidates: Sequence[_Candidate], encoded: EncodedPrompts, num_prompts: int
    ) -> job_pb2.PreparationReport:
        rejected = sorted(self._rejections.items, key=lambda item: (item.dataset, item.sample))
        truncated = [message for item in candidates for message in self._truncations(item, encoded)]
        buckets = _buckets_of(self._spec, candidates)
        return job_pb2.PreparationReport(
            num_images=sum(not self._is_evaluation(item) for item in candidates),
            num_images_cached=self._num_images_cached,
            num_prompts=num_prompts,
            num_prompts_cached=encoded.num_cached,
            rejected=rejected[:MAX_REJECTED],
            buckets=bucket_reports(buckets),
            truncated=truncated[:MAX_TRUNCATED],
            embedding_errors=encoded.errors(),
        )

    def _truncations(self, candidate: _Candidate, encoded: EncodedPrompts) -> list[job_pb2.TruncatedCaption]:
        return [
            job_pb2.TruncatedCaption(
                dataset=self._spec.datasets[candidate.choice].dataset,
                sample=candidate.sample.name,
                encoder=cut.encoder,
                num_tokens=cut.num_tokens,
                max_length=cut.max_length,
                dropped_text=cut.dropped_text[:_MAX_DROPPED_CHARACTERS],
            )
            for caption in candidate.captions
            for cut in encoded.cuts.get(caption, ())
        ]

    async def _tell_losses(self, report: job_pb2.PreparationReport, encoded: EncodedPrompts) -> None:
        num_rejected = len(self._rejections.items)
        if num_rejected:
            first = report.rejected[0]
            await self._task.notice(
                "IMAGES_REJECTED",
                f"{num_rejected} {'image is' if num_rejected == 1 else 'images are'} not used, the first is "
                f"{first.sample} of {first.dataset}: {first.message}",
            )
        if encoded.cuts:
            await self._task.notice(
                "CAPTIONS_TRUNCATED",
                f"{len(encoded.cuts)} captions are longer than an encoder reads; the job's preparation report shows "
                "what was cut off. Say what matters first, or shorten them.",
            )

    async def _tell_errors(self, report: job_pb2.PreparationReport) -> None:
        if report.embedding_errors:
            parts = [
                f"{each.encoder} by {each.mean:.2%} on average, {each.max:.2%} at most"
                for each in report.embedding_errors
            ]
            await self._task.notice(
                "EMBEDDINGS_CHANGED", f"compact storage changes the embeddings of {'; of '.join(parts)} (relative norm)"
            )

    def _progress(self, stage: str, num_total: int) -> StageProgress:
        return StageProgress(stage, num_total, self._task.on_progress, self._preparer.progress_seconds)

    def _patience(self, service: str) -> Patience:
        return Patience(service, self._preparer.patience_seconds, self._task.notice)

    async def _in_store(self, work: Callable[[], Result]) -> Result:
        return await patiently(lambda: asyncio.to_thread(work), self._store_patience)


def _encoder_neighbours(encoders: EncoderPlan) -> list[Neighbour]:
    return [
        Neighbour(release=host.client.release, patience=host.patience, address=host.client.address)
        for host in encoders.hosts
    ]


def require_batches(spec: JobSpec, buckets: Sequence[Bucket]) -> None:
    """Refuse a job of which a bucket cannot fill one optimiser step (spec 6.6).

    Raises:
        JobFailedError: with a table of the buckets that fail.
    """
    message = describe_underfilled(buckets, spec)
    if message is not None:
        raise JobFailedError("ZERO_USABLE_BATCHES", message, UNDERFILLED_REMEDY)


def _buckets_of(spec: JobSpec, candidates: Sequence[_Candidate]) -> list[Bucket]:
    buckets = []
    for index, choice in enumerate(spec.datasets):
        plans = [item.plan for item in candidates if item.choice == index and item.plan is not None]
        buckets += count_buckets(index, choice, [(plan.width, plan.height) for plan in plans])
    return buckets


def _image_size(candidate: _Candidate) -> ImageSize:
    if candidate.size is None:
        raise AssertionError(f"{candidate.sample.name} was planned before it was opened")
    return ImageSize(key=candidate.sample.image.sha256, width=candidate.size[0], height=candidate.size[1])


def _planned_image(candidate: _Candidate, file: common_pb2.ObjectRef | None) -> PlannedImage:
    if candidate.plan is None or file is None:
        raise AssertionError(f"{candidate.sample.name} was encoded before it was planned")
    return PlannedImage(image=file, plan=candidate.plan)


def _prepared_sample(candidate: _Candidate, choice: DatasetChoice) -> PreparedSample:
    plan, latents = candidate.plan, candidate.latents
    if plan is None or latents is None:
        raise AssertionError(f"{candidate.sample.name} is not encoded")
    return PreparedSample(
        source=candidate.choice,
        name=candidate.sample.name,
        width=plan.width,
        height=plan.height,
        image_sha256=candidate.sample.image.sha256,
        latents=latents,
        captions=caption_orders(candidate.sample, choice),
        mask=candidate.mask,
    )
