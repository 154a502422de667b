"""When the evaluation loss is measured, and what is told of it."""

from collections.abc import Iterable

import pytest
import torch
from reverie_hidream.conditioning import TextConditioning
from reverie_hidream.training.evaluation import Evaluation, EvaluationBatch, TimestepLoss
from reverie_trainer.jobs.preparing.epochs import EpochClock, StepRange
from reverie_trainer.jobs.spec import Evaluation as EvaluationChoice
from reverie_trainer.worker.measures import Measures
from reverie_trainer.worker.outbox import Outbox

BATCH = EvaluationBatch(
    latents=torch.zeros(1, 16, 2, 2),
    noise=torch.zeros(1, 16, 2, 2),
    conditioning=TextConditioning(t5=torch.zeros(1, 1, 1), llama=torch.zeros(1, 1, 1, 1), pooled=torch.zeros(1, 1)),
)


def measures(choice: EvaluationChoice | None, outbox: Outbox) -> Measures:
    def read(dataset: str, num_images: int) -> list[EvaluationBatch]:
        return [BATCH] * {"few": 1, "many": num_images}[dataset]

    return Measures(
        choice=choice,
        datasets=("few", "many"),
        max_steps=20,
        clock=EpochClock(ranges=[StepRange()], num_batches=[6]),
        read_batches=read,
        outbox=outbox,
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (EvaluationChoice(every_steps=8), [0, 8, 16, 20]),
        (EvaluationChoice(every_steps=0), [0, 20]),
        (EvaluationChoice(every_steps=0, every_epochs=1.0), [0, 6, 12, 18, 20]),
        (EvaluationChoice(every_steps=0, every_epochs=0.5), [0, 3, 6, 9, 12, 15, 18, 20]),
        (None, []),
    ],
)
def test_is_due_by_steps_by_epochs_and_at_both_ends(choice: EvaluationChoice | None, expected: list[int]) -> None:
    due = measures(choice, Outbox())
    assert [step for step in range(21) if due.is_due(step)] == expected


def test_every_dataset_is_measured_with_so_many_images_and_timesteps() -> None:
    asked: list[tuple[int, int]] = []

    def measure(batches: Iterable[EvaluationBatch], num_timesteps: int) -> Evaluation:
        asked.append((len(list(batches)), num_timesteps))
        return Evaluation(loss=0.25, timesteps=(TimestepLoss(timestep=1000.0, loss=0.25),))

    outbox = Outbox()
    choice = EvaluationChoice(num_images=3, num_timesteps=7)
    measures(choice, outbox).measure(8, measure, weights="ema")
    report = outbox.take()
    found = [event.evaluation for event in report.events]
    assert asked == [(1, 7), (3, 7)]
    assert [(each.step, each.dataset, each.loss, each.weights) for each in found] == [
        (8, "few", 0.25, "ema"),
        (8, "many", 0.25, "ema"),
    ]
    assert [(each.timestep, each.loss) for each in found[0].timesteps] == [(1000.0, 0.25)]
    assert [phase.name for phase in report.phases] == ["evaluate"]
