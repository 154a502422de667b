"""Log lines are complete for machines, readable for people, and silent about secrets."""

import io
import json
import logging
from typing import Any

import pytest
from reverie_common.telemetry.logs import configure_logging, request_id

logger = logging.getLogger("reverie_painter.brush")


@pytest.fixture
def stream() -> io.StringIO:
    """Where this test's logs go."""
    return io.StringIO()


def only_line(stream: io.StringIO) -> dict[str, Any]:
    """The one line of JSON that was logged."""
    (line,) = stream.getvalue().splitlines()
    parsed = json.loads(line)
    assert isinstance(parsed, dict)
    return parsed


def test_a_line_is_json_with_the_events_own_fields(stream: io.StringIO) -> None:
    configure_logging("painter", "json", stream=stream)
    logger.info("painted %d strokes", 3, extra={"job_id": "j1", "name_of_colour": "red"})
    line = only_line(stream)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "service": "painter",
        "logger": "reverie_painter.brush",
        "message": "painted 3 strokes",
        "job_id": "j1",
        "name_of_colour": "red",
    }


@pytest.mark.parametrize("field", ["secret_key", "password", "lease_token", "token", "Authorization", "access_key"])
def test_secrets_are_never_written(stream: io.StringIO, field: str) -> None:
    configure_logging("painter", "json", stream=stream)
    logger.info("connected", extra={field: "hush"})
    assert "hush" not in stream.getvalue()
    assert only_line(stream)[field] == "***"


def test_numbers_of_tokens_are_no_secret(stream: io.StringIO) -> None:
    configure_logging("painter", "json", stream=stream)
    logger.info("encoded", extra={"num_tokens": 128})
    assert only_line(stream)["num_tokens"] == 128


def test_the_request_id_is_on_every_line_of_a_request(stream: io.StringIO) -> None:
    configure_logging("painter", "json", stream=stream)
    mark = request_id.set("r-1")
    logger.info("painted")
    request_id.reset(mark)
    assert only_line(stream)["request_id"] == "r-1"


def test_a_trace_stays_within_its_line(stream: io.StringIO) -> None:
    configure_logging("painter", "json", stream=stream)
    try:
        raise ValueError("dry brush")
    except ValueError:
        logger.exception("failed")
    assert "ValueError: dry brush" in only_line(stream)["trace"]


def test_fields_that_json_does_not_know_are_written_as_text(stream: io.StringIO) -> None:
    configure_logging("painter", "json", stream=stream)
    logger.info("painted", extra={"where": {1}})
    assert only_line(stream)["where"] == "{1}"


def test_lines_below_the_level_are_left_out(stream: io.StringIO) -> None:
    configure_logging("painter", "json", level="warning", stream=stream)
    logger.info("painted")
    assert stream.getvalue() == ""


def test_libraries_are_quieter_than_we_are(stream: io.StringIO) -> None:
    configure_logging("painter", "json", level="debug", stream=stream)
    logging.getLogger("urllib3.connectionpool").info("GET /")
    assert stream.getvalue() == ""


def test_configuring_again_replaces_the_first_time(stream: io.StringIO) -> None:
    configure_logging("painter", "json", stream=stream)
    configure_logging("painter", "json", stream=stream)
    logger.info("painted")
    only_line(stream)


def test_people_get_plain_text_with_fields(stream: io.StringIO) -> None:
    configure_logging("painter", "console", stream=stream)
    logger.warning("dry", extra={"job_id": "j1"})
    assert stream.getvalue().split(maxsplit=1)[1] == "painter  warning dry job_id=j1\n"


def test_colours_are_for_terminals(stream: io.StringIO) -> None:
    configure_logging("painter", "console", stream=stream)
    logger.error("dry")
    assert "\033[" not in stream.getvalue()


class Terminal(io.StringIO):
    """Text that says that it is a terminal."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def test_a_terminal_gets_colours() -> None:
    terminal = Terminal()
    configure_logging("painter", "console", stream=terminal)
    logger.error("dry")
    assert "\033[31merror" in terminal.getvalue()
