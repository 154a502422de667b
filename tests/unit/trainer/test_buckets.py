"""Buckets, batches and epochs: the rules of spec 6.5 and 6.6."""

from dataclasses import replace

import pytest
from reverie_trainer.jobs.preparing.buckets import (
    Bucket,
    count_buckets,
    describe_empty,
    describe_underfilled,
    minimum_repeats,
    scheduled_buckets,
    steps_per_epoch,
    with_max_steps,
)
from reverie_trainer.jobs.spec import DatasetChoice, JobSpec, Optimization

CATS = DatasetChoice(dataset="cats")


def spec(batch_size: int, accumulated: int, choice: DatasetChoice = CATS) -> JobSpec:
    optimization = Optimization(max_steps=10, batch_size=batch_size, gradient_accumulation_steps=accumulated)
    return JobSpec(datasets=(choice,), optimization=optimization)


def test_repeats_are_extra_passes() -> None:
    bucket = Bucket(source=0, dataset="cats", repeats=1000, width=512, height=512, num_images=20)
    assert steps_per_epoch([bucket], 1, 1) == 20_020


def test_epoch_counts_batches_by_bucket_and_rounds_up() -> None:
    buckets = [
        Bucket(source=0, dataset="cats", repeats=0, width=512, height=512, num_images=5),
        Bucket(source=0, dataset="cats", repeats=0, width=640, height=448, num_images=4),
    ]
    assert steps_per_epoch(buckets, 4, 1) == 3
    assert steps_per_epoch(buckets, 4, 2) == 2


def test_buckets_are_counted_largest_first() -> None:
    buckets = count_buckets(0, CATS, [(512, 512), (640, 448), (640, 448)])
    assert [(bucket.width, bucket.num_images) for bucket in buckets] == [(640, 2), (512, 1)]


def test_underfilled_bucket_is_told_with_the_repeats_that_it_needs() -> None:
    buckets = [
        Bucket(source=0, dataset="cats", repeats=0, width=512, height=512, num_images=8),
        Bucket(source=0, dataset="cats", repeats=0, width=640, height=448, num_images=3),
    ]
    message = describe_underfilled(buckets, spec(4, 2))
    assert message is not None
    assert "zero usable batches" in message
    assert "cats | 640x448 | 3 | 0 | 3 | 2 | train | all" in message
    assert "512x512" not in message
    assert "Minimum repeats required: 2" in message
    assert describe_underfilled(buckets, spec(3, 1)) is None


@pytest.mark.parametrize(("images", "effective", "repeats"), [(1, 1, 0), (3, 8, 2), (4, 8, 1), (1, 8, 7), (9, 8, 0)])
def test_minimum_repeats_are_those_of_the_specification(images: int, effective: int, repeats: int) -> None:
    assert minimum_repeats(images, effective) == repeats


def test_empty_dataset_is_told_in_the_words_that_guides_use() -> None:
    assert "no images detected in dataset" in describe_empty("cats", 0)
    assert "3 images were rejected" in describe_empty("cats", 3)


def test_oversubscription_fills_small_buckets_and_no_others() -> None:
    buckets = [
        Bucket(source=0, dataset="cats", repeats=0, width=512, height=512, num_images=8),
        Bucket(source=0, dataset="cats", repeats=0, width=640, height=448, num_images=3),
    ]
    filled = replace(spec(4, 2), allow_dataset_oversubscription=True)
    assert describe_underfilled(buckets, filled) is None
    assert [bucket.repeats for bucket in scheduled_buckets(buckets, filled)] == [0, 2]
    assert scheduled_buckets(buckets, spec(4, 2)) == buckets


def test_evaluation_buckets_make_no_steps_and_need_none() -> None:
    bucket = Bucket(source=0, dataset="cats", role="evaluation", repeats=0, width=512, height=512, num_images=1)
    assert describe_underfilled([bucket], spec(4, 2)) is None
    assert steps_per_epoch([bucket], 1, 1) == 0


def test_underfilled_bucket_is_told_with_its_role_and_steps() -> None:
    choice = replace(CATS, role="regularisation", start_step=5, end_step=9)
    buckets = count_buckets(0, choice, [(512, 512)])
    message = describe_underfilled(buckets, spec(4, 2, choice))
    assert message is not None
    assert "cats | 512x512 | 1 | 0 | 1 | 7 | regularisation | 5 to 9" in message


def test_epochs_become_steps() -> None:
    # 20 images, 1001 passes, batch 1: 20,020 steps in an epoch (spec 12.2).
    choice = replace(CATS, repeats=1000)
    job = replace(spec(1, 1, choice), optimization=Optimization(num_epochs=3))
    filled = with_max_steps(job, count_buckets(0, choice, [(512, 512)] * 20))
    assert filled.optimization.max_steps == 60_060
    assert with_max_steps(spec(1, 1), []) == spec(1, 1)


def test_epochs_over_several_sizes_and_accumulation_end_with_the_last_batch() -> None:
    job = replace(spec(4, 3), optimization=Optimization(num_epochs=2, batch_size=4, gradient_accumulation_steps=3))
    # 5 and 2 images: 2 + 1 batches in an epoch, 6 in two, 2 steps of 3.
    filled = with_max_steps(job, count_buckets(0, CATS, [(512, 512)] * 5 + [(640, 448)] * 2))
    assert filled.optimization.max_steps == 2
