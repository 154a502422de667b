"""Asking in chunks while services come and go, without sockets."""

from collections.abc import AsyncGenerator, Sequence

import pytest
from reverie_common.errors import InternalError, InvalidArgumentError, NotFoundError, ReverieError, UnavailableError
from reverie_trainer.jobs.preparing.patience import (
    Patience,
    ask_in_chunks,
    both,
    is_worth_repeating,
    patiently,
    tell_nobody,
)
from reverie_trainer.jobs.running.failures import JobFailedError


class Asked:
    """A service that answers with ten times the number, and fails as told."""

    def __init__(self, *errors: ReverieError, answers_before_error: int = 0) -> None:
        self.errors = list(errors)
        self.answers_before_error = answers_before_error
        self.calls: list[list[int]] = []

    async def answer(self, items: Sequence[int]) -> AsyncGenerator[tuple[int, int], None]:
        self.calls.append(list(items))
        error = self.errors.pop(0) if self.errors else None
        for index in reversed(range(len(items))):
            if error is not None and len(items) - 1 - index >= self.answers_before_error:
                raise error
            yield index, items[index] * 10


def patience(limit_seconds: float = 5.0) -> Patience:
    return Patience("the service", limit_seconds, tell_nobody)


async def ask(asked: Asked, items: Sequence[int], limit_seconds: float = 5.0) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}

    async def on_answer(index: int, answer: int) -> None:
        answers.setdefault(index, []).append(answer)

    await ask_in_chunks(items, asked.answer, on_answer, patience=patience(limit_seconds), chunk_size=4, num_parallel=2)
    return answers


async def test_every_item_is_answered_once() -> None:
    asked = Asked()
    assert await ask(asked, range(10)) == {index: [index * 10] for index in range(10)}
    assert sorted(map(len, asked.calls)) == [2, 4, 4]


async def test_nothing_is_asked_for_no_items() -> None:
    asked = Asked()
    assert await ask(asked, []) == {}
    assert asked.calls == []


async def test_only_what_is_missing_is_asked_again() -> None:
    asked = Asked(UnavailableError("gone"), answers_before_error=3)
    assert await ask(asked, range(4)) == {index: [index * 10] for index in range(4)}
    assert asked.calls == [[0, 1, 2, 3], [0]]


async def test_refusal_is_raised_as_it_is() -> None:
    with pytest.raises(InvalidArgumentError, match="prompt 3"):
        await ask(Asked(InvalidArgumentError("prompt 3 is too long")), range(4))


async def test_patience_ends() -> None:
    with pytest.raises(JobFailedError) as caught:
        await ask(Asked(*[UnavailableError("gone", reason="STORE_UNAVAILABLE")] * 9), range(4), limit_seconds=0.1)
    assert caught.value.reason == "STORE_UNAVAILABLE"
    assert "the service" in caught.value.remedy


async def test_answer_resets_patience() -> None:
    errors = [UnavailableError("gone") for _ in range(2)]

    async def call() -> str:
        if errors:
            raise errors.pop()
        return "answer"

    waited = patience(limit_seconds=30.0)
    assert await patiently(call, waited) == "answer"
    assert await patiently(call, waited) == "answer"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UnavailableError("x"), True),
        (InternalError("x", reason="CANCELLED"), True),
        (InternalError("x"), False),
        (NotFoundError("x"), False),
    ],
)
def test_only_what_may_pass_is_repeated(error: ReverieError, expected: bool) -> None:
    assert is_worth_repeating(error) is expected


async def test_first_error_of_two_is_raised() -> None:
    async def fail() -> None:
        raise NotFoundError("no image")

    async def succeed() -> int:
        return 1

    with pytest.raises(NotFoundError, match="no image"):
        await both(fail(), succeed())
