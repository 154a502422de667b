"""Which texts a sample is trained with, whatever the strategy."""

from dataclasses import replace
from itertools import permutations

import pytest
from reverie.common.v1 import common_pb2
from reverie_trainer.jobs.catalog.manifests import Sample
from reverie_trainer.jobs.preparing.captions import NUM_ORDERS, caption_orders, captions_of, shuffled_orders
from reverie_trainer.jobs.spec import DatasetChoice

SAMPLE = Sample(name="old/a_red_cat.png", image=common_pb2.ObjectRef(), captions=("a cat", "un chat"))
BARE = replace(SAMPLE, captions=())
CHOICE = DatasetChoice(dataset="cats")


@pytest.mark.parametrize(
    ("sample", "choice", "expected"),
    [
        (SAMPLE, CHOICE, ("a cat", "un chat")),
        (SAMPLE, replace(CHOICE, instance_prompt="sks"), ("a cat", "un chat")),
        (BARE, replace(CHOICE, instance_prompt="sks"), ("sks",)),
        (BARE, CHOICE, ()),
        (SAMPLE, replace(CHOICE, caption_strategy="filename"), ("a red cat",)),
        (SAMPLE, replace(CHOICE, caption_strategy="instanceprompt", instance_prompts=("sks", "zorp")), ("sks", "zorp")),
        (
            SAMPLE,
            replace(CHOICE, instance_prompt="sks", prepend_instance_prompt=True),
            ("sks a cat", "sks un chat"),
        ),
        # Nothing to put it before: it stands alone.
        (BARE, replace(CHOICE, instance_prompt="sks", prepend_instance_prompt=True), ("sks",)),
        (replace(SAMPLE, name="___.png"), replace(CHOICE, caption_strategy="filename", instance_prompt="x"), ("x",)),
    ],
)
def test_texts_come_from_where_the_strategy_says(
    sample: Sample, choice: DatasetChoice, expected: tuple[str, ...]
) -> None:
    assert captions_of(sample, choice) == expected
    assert caption_orders(sample, choice) == tuple((text,) for text in expected)


def test_orders_are_some_of_the_permutations_and_begin_with_the_caption() -> None:
    caption = "a, b,c ,d"
    orders = shuffled_orders(caption)
    assert orders[0] == caption
    assert len(set(orders)) == len(orders) <= NUM_ORDERS
    assert set(orders[1:]) <= {", ".join(order) for order in permutations("abcd")}
    assert shuffled_orders(caption) == orders


@pytest.mark.parametrize(("caption", "limit"), [("a cat", 1), ("a,", 1), ("a, b", 2)])
def test_short_captions_have_few_orders(caption: str, limit: int) -> None:
    assert len(shuffled_orders(caption)) <= limit


def test_each_caption_has_its_own_orders() -> None:
    sample = replace(SAMPLE, captions=("a, b, c", "d"))
    orders = caption_orders(sample, replace(CHOICE, caption_shuffle=True))
    assert len(orders) == 2
    assert orders[1] == ("d",)
    assert len(orders[0]) > 1
