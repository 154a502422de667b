"""Services that share a card take turns while a job is prepared, and must hold their encoders as the job demands."""

from typing import Any

import pytest
from reverie.training.v1 import job_pb2, training_pb2
from reverie_common.errors import InvalidArgumentError
from reverie_common.rpc.channel import translated

CATS = [("512x512 a", ["a cat"]), ("640x448 b", ["a red cat"]), ("640x448 c", ["a cat"])]


def shared_log(neighbours: Any) -> list[str]:
    """Let encoder and VAE write into one log, and return it."""
    neighbours.vae.log = neighbours.encoder.log
    log: list[str] = neighbours.encoder.log
    log.clear()
    return log


async def run(trainer: Any, spec: job_pb2.TrainingJobSpec) -> list[job_pb2.TrainingJobEvent]:
    events: list[job_pb2.TrainingJobEvent] = await trainer.watch((await trainer.submit(spec)).job_id)
    return events


async def test_encoders_and_vae_take_turns_and_leave_the_card_to_the_worker(
    trainer: Any, make_spec: Any, neighbours: Any
) -> None:
    await trainer.add_dataset("turns", CATS)
    log = shared_log(neighbours)
    await run(trainer, make_spec("turns", memory=job_pb2.MemorySpec(offload_during_startup=True)))
    changes = [entry for index, entry in enumerate(log) if index == 0 or entry != log[index - 1]]
    assert changes == [
        "vae released",
        "prompt encoded",
        "encoder released",
        "image encoded",
        "encoder released",
        "vae released",
    ]
    # Nothing is left to encode; the worker's turn still comes.
    log.clear()
    await run(trainer, make_spec("turns", memory=job_pb2.MemorySpec(offload_during_startup=True)))
    assert log == ["encoder released", "vae released"]


async def test_without_the_setting_nothing_is_released(trainer: Any, make_spec: Any, neighbours: Any) -> None:
    await trainer.add_dataset("no-turns", CATS)
    log = shared_log(neighbours)
    await run(trainer, make_spec("no-turns"))
    assert set(log) == {"prompt encoded", "image encoded"}


async def test_a_busy_service_is_told_about(trainer: Any, make_spec: Any, neighbours: Any) -> None:
    await trainer.add_dataset("busy", CATS)
    neighbours.encoder.is_busy = True
    events = await run(trainer, make_spec("busy", memory=job_pb2.MemorySpec(offload_during_startup=True)))
    neighbours.encoder.is_busy = False
    told = [event.notice for event in events if event.HasField("notice")]
    assert {notice.reason for notice in told} == {"MEMORY_IN_USE"}
    assert neighbours.encoder_server.target in told[0].message
    assert events[-1].snapshot.state == job_pb2.TRAINING_JOB_STATE_SUCCEEDED


async def test_the_precision_of_an_encoder_is_demanded(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("precise", CATS)
    wanted = {"t5": "int8-quanto", "llama": "no_change"}
    spec = make_spec("precise", model=job_pb2.ModelSpec(text_encoder_precision=wanted))
    response = await trainer.training.CheckTrainingJob(training_pb2.CheckTrainingJobRequest(spec=spec))
    (violation,) = response.violations
    assert violation.field == "model.text_encoder_precision['t5']"
    assert "the job wants t5 in 'int8-quanto', the encoder service holds it in 'no_change'" in violation.description
    assert "--precision t5=int8-quanto" in violation.description
    with pytest.raises(InvalidArgumentError), translated():
        await trainer.submit(spec)


async def test_what_encoders_hold_is_checked_again_when_they_are_asked(
    trainer: Any, make_spec: Any, neighbours: Any
) -> None:
    await trainer.add_dataset("changed", CATS)
    # Replaced between the check and the preparation.
    neighbours.encoder.precisions = ["int8-quanto"]
    spec = make_spec("changed", model=job_pb2.ModelSpec(text_encoder_precision={"t5": "int8-quanto"}))
    failure = (await run(trainer, spec))[-1].snapshot.failure
    assert failure.reason == "ENCODER_PRECISION"
    assert "the encoder service holds it in 'no_change'" in failure.message


async def test_more_blocks_than_the_model_has_cannot_wait(trainer: Any, make_spec: Any) -> None:
    await trainer.add_dataset("blocks", CATS)
    spec = make_spec("blocks", memory=job_pb2.MemorySpec(num_offloaded_blocks=100))
    response = await trainer.training.CheckTrainingJob(training_pb2.CheckTrainingJobRequest(spec=spec))
    assert [item.field for item in response.violations] == ["memory.num_offloaded_blocks"]
    assert "100 is above the model's 4 blocks; lower it" in response.violations[0].description
