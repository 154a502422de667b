"""Joining the embeddings of single prompts into batches."""

import pytest
import torch
from reverie_hidream.conditioning import TextConditioning, collate, join


def sample(value: float) -> dict[str, torch.Tensor]:
    return {
        "clip_l": torch.full((2,), value),
        "clip_g": torch.full((3,), value + 0.5),
        "t5": torch.full((4, 6), value),
        "llama": torch.full((7, 4, 8), value),
    }


def test_collate_stacks_prompts_and_joins_the_clips_in_order() -> None:
    batch = collate([sample(1.0), sample(2.0)])

    assert batch.batch_size == 2
    assert batch.t5.shape == (2, 4, 6)
    assert batch.llama.shape == (7, 2, 4, 8)
    assert batch.pooled.tolist() == [[1.0, 1.0, 1.5, 1.5, 1.5], [2.0, 2.0, 2.5, 2.5, 2.5]]
    assert batch.llama[:, 1].eq(2.0).all()


def test_collate_names_the_encoder_that_is_missing() -> None:
    broken = sample(1.0)
    del broken["llama"]

    with pytest.raises(ValueError, match=r"sample 1 lacks the embeddings of llama"):
        collate([sample(1.0), broken])


def test_collate_refuses_an_empty_batch() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


def test_join_puts_the_first_batch_first() -> None:
    joined = join(collate([sample(1.0)]), collate([sample(2.0)]))

    assert joined.t5[:, 0, 0].tolist() == [1.0, 2.0]
    assert joined.llama[0, :, 0, 0].tolist() == [1.0, 2.0]
    assert joined.pooled[:, 0].tolist() == [1.0, 2.0]


def test_repeat_keeps_copies_of_a_prompt_together() -> None:
    repeated = collate([sample(1.0), sample(2.0)]).repeat(2)

    assert repeated.t5[:, 0, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert repeated.llama[0, :, 0, 0].tolist() == [1.0, 1.0, 2.0, 2.0]


def test_select_takes_the_prompts_at_some_places_in_that_order() -> None:
    selected = collate([sample(1.0), sample(2.0), sample(3.0)]).select([2, 0])

    assert selected.t5[:, 0, 0].tolist() == [3.0, 1.0]
    assert selected.llama[0, :, 0, 0].tolist() == [3.0, 1.0]
    assert selected.pooled[:, 0].tolist() == [3.0, 1.0]


def test_to_changes_the_dtype_of_all_three() -> None:
    moved = collate([sample(1.0)]).to(dtype=torch.bfloat16)

    assert {moved.t5.dtype, moved.llama.dtype, moved.pooled.dtype} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("t5", "llama", "pooled", "message"),
    [
        ((4, 6), (7, 1, 4, 8), (1, 5), "3, 4 and 2 dimensions"),
        ((2, 4, 6), (7, 1, 4, 8), (2, 5), "same batch; got 2, 1, 2"),
    ],
)
def test_refuses_tensors_that_do_not_belong_together(
    t5: tuple[int, ...], llama: tuple[int, ...], pooled: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TextConditioning(t5=torch.zeros(t5), llama=torch.zeros(llama), pooled=torch.zeros(pooled))
