"""The page for people who come from SimpleTuner says what the import does."""

from pathlib import Path

from reverie_client.simpletuner.keys import GROUPS
from reverie_client.simpletuner.table import options_as_json, options_table

PAGE = Path(__file__).parents[4] / "docs" / "coming-from-simpletuner.md"


def test_the_table_of_the_page_is_that_of_the_import() -> None:
    _, _, rest = PAGE.read_text().partition("<!-- begin: options -->\n")
    table, _, _ = rest.partition("\n<!-- end: options -->")
    assert table == options_table(), "make it anew: reverie import options"


def test_every_option_says_what_becomes_of_it() -> None:
    for title, options in options_as_json().items():
        assert len(options) == len(GROUPS[title])
        for option in options:
            assert option["outcome"] in ("honoured", "changed", "ignored", "refused"), option
            assert option["field"] or option["notes"], option
