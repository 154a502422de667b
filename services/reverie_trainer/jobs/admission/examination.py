"""CheckTrainingJob: what would be accepted, what it would take, and the plan, without changing anything."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from google.protobuf.duration_pb2 import Duration
from reverie.common.v1 import common_pb2
from reverie.encoder.v1 import encoder_pb2
from reverie.training.v1 import job_pb2, training_pb2
from reverie.vae.v1 import vae_pb2
from reverie_common.errors import FieldViolation, ReverieError

from reverie_trainer.jobs.admission.adapter_selection import TransformerConfig
from reverie_trainer.jobs.admission.admission import Admission, describe_plan, examine, warnings_of
from reverie_trainer.jobs.admission.estimate import count_prompts, epoch_steps, seconds_per_step
from reverie_trainer.jobs.admission.resources import Demand, Resources
from reverie_trainer.jobs.catalog.datasets import Datasets
from reverie_trainer.jobs.catalog.manifests import Sample
from reverie_trainer.jobs.preparing.buckets import (
    Bucket,
    count_buckets,
    describe_empty,
    describe_underfilled,
    epoch_clock,
    with_max_steps,
)
from reverie_trainer.jobs.preparing.geometry import ImagePlan, ImageSize, LeftOut, plan_choice, square_edge
from reverie_trainer.jobs.preparing.inspection import ImageInspector
from reverie_trainer.jobs.preparing.services import Services
from reverie_trainer.jobs.running.failures import JobFailedError
from reverie_trainer.jobs.spec import JobSpec, spec_to_proto
from reverie_trainer.jobs.state.database import Database

logger = logging.getLogger(__name__)

FurtherCheck = Callable[[JobSpec], Awaitable[Sequence[FieldViolation]]]
"""What other parts of the trainer find wrong with a job: with where it begins, with whom it tells."""

FurtherNotices = Callable[[JobSpec], Awaitable[Sequence[tuple[str, str]]]]
"""What will be missing although a job is accepted: (reason, message)."""

_DESCRIBE_SECONDS = 3.0

# A check answers at once; images that are not opened by then are left to preparation.
_INSPECT_SECONDS = 20.0


class Examiner:
    """Checks jobs against the datasets, the model and the services of this trainer."""

    def __init__(
        self,
        database: Database,
        datasets: Datasets,
        services: Services,
        config: TransformerConfig,
        further: Sequence[FurtherCheck],
        notices: Sequence[FurtherNotices] = (),
        encoder_configs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._database = database
        self._datasets = datasets
        self._services = services
        self._config = config
        self._further = tuple(further)
        self._notices = tuple(notices)
        self._resources = Resources(config=config, encoder_configs=encoder_configs or {})
        self._inspector = ImageInspector(services.vae, patience_seconds=0.0)

    async def admit(self, spec: JobSpec) -> Admission:
        """Return whether a job would be accepted, and the datasets that it would train on."""
        admission = await examine(spec, self._datasets, self._config)
        further = [violation for check in self._further for violation in await check(spec)]
        notices = [notice for tell in self._notices for notice in await tell(spec)]
        return replace(admission, violations=(*admission.violations, *further), notices=tuple(notices))

    def warnings_of(self, admission: Admission) -> list[tuple[str, str]]:
        """Return what is not as it was asked for although a job is accepted: (reason, message)."""
        return warnings_of(admission, self._config)

    async def check(self, spec: JobSpec) -> training_pb2.CheckTrainingJobResponse:
        """Return every violation, or the plan and what the job would take."""
        admission = await self.admit(spec)
        response = training_pb2.CheckTrainingJobResponse(spec=spec_to_proto(spec))
        for violation in admission.violations:
            response.violations.add(field=violation.field, description=violation.description)
        selection = admission.selection
        if admission.violations or selection is None:
            return response
        buckets, problems = await self._buckets(admission)
        if buckets:
            spec = with_max_steps(spec, buckets)
            admission = replace(admission, spec=spec)
            response.spec.CopyFrom(spec_to_proto(spec))
        response.plan.extend(describe_plan(admission, self._config, buckets))
        response.plan.extend(problems)
        descriptions = await self._describe_encoders()
        if descriptions is None:
            response.plan.append("no encoder service answers: encoders and embeddings are counted in bfloat16")
        demand = Demand(
            spec=spec,
            selection=selection,
            buckets=buckets,
            num_prompts=count_prompts(admission),
            num_pixels=self._pixels(admission, buckets),
            encoders=descriptions or [],
        )
        response.estimate.CopyFrom(await self._estimate(admission, demand))
        response.plan.extend(self._resources.hints(demand))
        response.plan.append(_describe_epochs(spec, buckets, response.estimate.steps_per_epoch))
        return response

    async def _estimate(self, admission: Admission, demand: Demand) -> job_pb2.JobEstimate:
        spec = admission.spec
        estimate = self._resources.estimate(demand)
        num_images = {name: len(manifest.samples) for name, manifest in admission.manifests.items()}
        estimate.steps_per_epoch = epoch_steps(spec, num_images, demand.buckets)
        seconds = await self._database.run(lambda session: seconds_per_step(session, spec))
        if seconds is not None:
            estimate.training_time.CopyFrom(Duration(seconds=math.ceil(seconds * spec.optimization.max_steps)))
        return estimate

    def _pixels(self, admission: Admission, buckets: Sequence[Bucket] | None) -> int:
        if buckets is not None:
            return sum(bucket.num_images * bucket.width * bucket.height for bucket in buckets)
        return sum(
            len(admission.manifests[choice.dataset].samples)
            * min(square_edge(choice.resolution, choice.resolution_type) ** 2, self._config.max_pixels)
            for choice in admission.spec.datasets
        )

    async def _buckets(self, admission: Admission) -> tuple[list[Bucket] | None, list[str]]:
        """Return the buckets, None where the images cannot be opened now, and what is wrong with the images."""
        problems: list[str] = []
        buckets: list[Bucket] = []
        try:
            async with asyncio.timeout(_INSPECT_SECONDS):
                for index, choice in enumerate(admission.spec.datasets):
                    samples = admission.manifests[choice.dataset].samples
                    sizes, rejected = await self._sizes(samples)
                    plans = plan_choice([size for _, size in sizes], choice, admission.spec, self._config.max_pixels)
                    problems += rejected + [
                        f"WARNING: {name} is left out: {plan.message}"
                        for (name, _), plan in zip(sizes, plans, strict=True)
                        if isinstance(plan, LeftOut)
                    ]
                    shapes = [(plan.width, plan.height) for plan in plans if isinstance(plan, ImagePlan)]
                    buckets += count_buckets(index, choice, shapes)
                    if not shapes:
                        problems.append(f"WARNING: {describe_empty(choice.dataset, len(samples))}")
        except (JobFailedError, ReverieError, TimeoutError) as error:
            logger.info("images are not opened for a check: %s", error)
            return None, []
        underfilled = describe_underfilled(buckets, admission.spec)
        return buckets, problems + ([f"WARNING: {underfilled}"] if underfilled else [])

    async def _sizes(self, samples: Sequence[Sample]) -> tuple[list[tuple[str, ImageSize]], list[str]]:
        """Return (name, size) of the images that can be opened, and what is wrong with the others."""
        found: dict[int, ImageSize] = {}
        rejected = []

        async def on_inspected(index: int, response: vae_pb2.InspectImagesResponse) -> None:
            if response.HasField("rejection"):
                rejected.append(f"WARNING: {samples[index].name} cannot be used: {response.rejection.message}")
            else:
                image = response.image
                key = samples[index].image.sha256
                found[index] = ImageSize(key=key, width=image.width, height=image.height)

        images: list[common_pb2.ObjectRef] = [sample.image for sample in samples]
        await self._inspector.inspect(images, on_inspected)
        return [(samples[index].name, found[index]) for index in sorted(found)], rejected

    async def _describe_encoders(self) -> list[encoder_pb2.EncoderDescription] | None:
        described: dict[int, encoder_pb2.EncoderDescription] = {}
        try:
            for client in self._services.encoders:
                described.update({item.encoder: item for item in await client.describe(_DESCRIBE_SECONDS)})
        except ReverieError as error:
            logger.info("encoders are not described for a check: %s", error.message)
            return None
        return list(described.values())


def _describe_epochs(spec: JobSpec, buckets: Sequence[Bucket] | None, steps_per_epoch: int) -> str:
    """Return how long the job is, in steps and in epochs."""
    optimization = spec.optimization
    text = f"{steps_per_epoch} steps in an epoch"
    if not buckets:
        epochs = optimization.num_epochs or (optimization.max_steps / steps_per_epoch if steps_per_epoch else 0.0)
        return f"{text}, {epochs:.1f} epochs"
    clock = epoch_clock(buckets, spec)
    if optimization.num_epochs:
        return f"{text}, {optimization.num_epochs} epochs = {clock.steps_for(optimization.num_epochs)} steps"
    return f"{text}, {clock.epoch_at(optimization.max_steps):.1f} epochs"
