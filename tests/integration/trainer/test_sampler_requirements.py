"""Scores and previews that the trainer's sampler can give, or cannot."""

# ruff: noqa: N802 - the contract names the methods and what they are given

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from reverie.sampling.v1 import sampling_pb2, sampling_pb2_grpc
from reverie.training.v1 import job_pb2, training_pb2
from reverie_common.rpc.server import ServedService, Server
from reverie_common.settings import ServerSettings

CATS = [("512x512 a", ["a cat"])]


class Sampler(sampling_pb2_grpc.SamplingServiceServicer):
    """Describes itself as the test wants, and draws nothing."""

    def __init__(self, description: sampling_pb2.DescribeSamplerResponse) -> None:
        self._description = description

    async def DescribeSampler(
        self, request: sampling_pb2.DescribeSamplerRequest, context: Any
    ) -> sampling_pb2.DescribeSamplerResponse:
        return self._description

    async def Sample(
        self, request: sampling_pb2.SampleRequest, context: Any
    ) -> AsyncIterator[sampling_pb2.SampleResponse]:
        yield sampling_pb2.SampleResponse()


@asynccontextmanager
async def sampler(**description: Any) -> AsyncIterator[str]:
    served = ServedService(
        name="reverie.sampling.v1.SamplingService",
        add_to_server=sampling_pb2_grpc.add_SamplingServiceServicer_to_server,
        servicer=Sampler(sampling_pb2.DescribeSamplerResponse(**description)),
    )
    async with Server([served], ServerSettings(grace_seconds=0.0)) as server:
        yield server.target


async def check(trainer: Any, spec: job_pb2.TrainingJobSpec) -> training_pb2.CheckTrainingJobResponse:
    request = training_pb2.CheckTrainingJobRequest(spec=spec)
    response: training_pb2.CheckTrainingJobResponse = await trainer.training.CheckTrainingJob(request)
    return response


def pictures(**fields: Any) -> job_pb2.ValidationSpec:
    return job_pb2.ValidationSpec(prompt_library=True, resolutions=["256x256"], **fields)


async def test_scores_without_a_clip_model_are_refused_with_the_remedy(start_trainer: Any, make_spec: Any) -> None:
    async with sampler(has_previews=True) as address:
        trainer = await start_trainer(sampler=address)
        await trainer.add_dataset("unscored", CATS)
        checked = await check(trainer, make_spec("unscored", validation=pictures(clip_score=True, preview_steps=5)))
        unasked = await check(trainer, make_spec("unscored", validation=pictures()))
    assert [violation.field for violation in checked.violations] == ["validation.clip_score"]
    assert "--clip-model" in checked.violations[0].description
    assert not unasked.violations


async def test_a_sampler_that_can_do_it_all_is_not_spoken_of(start_trainer: Any, make_spec: Any) -> None:
    async with sampler(clip_model="clip", has_previews=True) as address:
        trainer = await start_trainer(sampler=address)
        await trainer.add_dataset("scored", CATS)
        checked = await check(trainer, make_spec("scored", validation=pictures(clip_score=True, preview_steps=5)))
    assert not checked.violations
    assert not [line for line in checked.plan if "WARNING" in line]


async def test_previews_that_nobody_can_draw_are_told_of(start_trainer: Any, make_spec: Any) -> None:
    async with sampler(clip_model="clip") as address:
        trainer = await start_trainer(sampler=address)
        await trainer.add_dataset("blind", CATS)
        spec = make_spec("blind", validation=pictures(preview_steps=5))
        plan = "\n".join((await check(trainer, spec)).plan)
        job = await trainer.submit(spec)
        events = await trainer.watch(job.job_id)
    assert "WARNING: preview_steps: the VAE service has no tiny decoder" in plan
    assert "NO_PREVIEWS" in [event.notice.reason for event in events if event.HasField("notice")]


async def test_a_sampler_that_is_away_keeps_no_job_out(start_trainer: Any, make_spec: Any, free_port: Any) -> None:
    trainer = await start_trainer(sampler=f"127.0.0.1:{free_port()}")
    await trainer.add_dataset("hopeful", CATS)
    checked = await check(trainer, make_spec("hopeful", validation=pictures(clip_score=True)))
    assert not checked.violations
    assert any("does not answer, so nobody knows whether it can score" in line for line in checked.plan)
