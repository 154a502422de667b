"""Pages and their tokens."""

import pytest
from reverie_common.errors import InvalidArgumentError
from reverie_trainer.jobs.api.paging import read_page, write_token


def test_zero_means_the_default_and_large_sizes_are_lowered() -> None:
    assert read_page(0, "", "jobs").size == 20
    assert read_page(7, "", "jobs").size == 7
    assert read_page(5000, "", "jobs").size == 100


def test_negative_size_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read_page(-1, "", "jobs")
    assert caught.value.violations[0].field == "page_size"


def test_token_leads_back_to_its_position() -> None:
    assert read_page(0, write_token("jobs", "17"), "jobs").after == "17"
    assert read_page(0, "", "jobs").after is None


@pytest.mark.parametrize("token", ["garbage", "!!!", write_token("datasets", "cats"), "W10=", "bnVsbA=="])
def test_token_of_another_list_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read_page(0, token, "jobs")
    assert caught.value.violations[0].field == "page_token"
