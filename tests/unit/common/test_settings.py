"""Settings come from flags, then the environment, then defaults; wrong ones are refused all at once."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict
from reverie_common.errors import InvalidArgumentError
from reverie_common.settings import CommaSeparated, ServerSettings, StoreSettings, is_loopback


class PainterSettings(ServerSettings, StoreSettings):
    """Settings of a service that only these tests have."""

    model_config = SettingsConfigDict(env_prefix="REVERIE_PAINTER_")

    colours: CommaSeparated = ("red",)
    """Colours that it paints with."""

    brush: Literal["round", "flat"] = "round"
    """Form of its brush."""

    width: int = Field(default=3, ge=1, le=9)
    """Width of its brush, 1 to 9 mm."""

    canvas: Path | None = None
    """Where it paints."""


def read(*flags: str) -> PainterSettings:
    """Read settings as a process does."""
    return PainterSettings.from_command_line(flags)


@pytest.fixture(autouse=True)
def _no_foreign_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REVERIE_STORE_ENDPOINT", "REVERIE_STORE_ACCESS_KEY", "REVERIE_STORE_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_defaults_listen_on_loopback() -> None:
    settings = read()
    assert (settings.host, settings.port, settings.store_endpoint) == ("127.0.0.1", 0, "127.0.0.1:8333")


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVERIE_PAINTER_WIDTH", "5")
    assert read().width == 5
    assert read("--width", "7").width == 7


def test_words_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("--colours", "red,green, blue").colours == ("red", "green", "blue")
    assert read("--colours=red").colours == ("red",)
    assert read("--colours", "red", "--colours", "green,blue").colours == ("red", "green", "blue")
    monkeypatch.setenv("REVERIE_PAINTER_COLOURS", "black,white")
    assert read().colours == ("black", "white")


def test_flags_are_written_with_dashes() -> None:
    assert read("--drain-seconds", "2.5").drain_seconds == 2.5


def test_booleans_need_no_value() -> None:
    assert read().reflection
    assert not read("--no-reflection").reflection


def test_store_variables_are_the_same_for_every_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVERIE_STORE_BUCKET", "pictures")
    monkeypatch.setenv("REVERIE_STORE_SECRET_KEY", "hush")
    settings = read()
    assert settings.store_bucket == "pictures"
    assert settings.store_secret_key.get_secret_value() == "hush"


def test_variables_of_another_service_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVERIE_ENCODER_PORT", "4")
    monkeypatch.setenv("REVERIE_PORT", "5")
    assert read().port == 0


def test_constructing_settings_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVERIE_PAINTER_WIDTH", "5")
    assert PainterSettings().width == 3


def test_settings_are_frozen() -> None:
    settings = read()
    with pytest.raises(ValidationError, match="frozen"):
        settings.width = 4


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="witdh"):
        PainterSettings(witdh=4)  # type: ignore[call-arg]  # that is what is tested


def test_unknown_flags_end_the_process_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--witdh", "4")
    assert caught.value.code == 2
    assert "--witdh" in capsys.readouterr().err


def test_wrong_settings_are_named_all_at_once() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read("--width", "12", "--port", "70000", "--brush", "square")
    error = caught.value
    assert error.reason == "INVALID_SETTINGS"
    assert {violation.field for violation in error.violations} == {"width", "port", "brush"}
    assert "--width (REVERIE_PAINTER_WIDTH)" in error.message


def test_help_tells_what_each_flag_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Width of its brush, 1 to 9 mm." in text
    assert "--store-endpoint" in text


def test_help_offers_no_flag_for_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    assert "--store-secret-key " not in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--store-secret-key=hush",), ("--store-access-key", "hush")])
def test_secrets_are_refused_on_the_command_line(flags: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read(*flags)
    assert caught.value.reason == "SECRET_ON_COMMAND_LINE"
    assert "hush" not in caught.value.message
    assert "REVERIE_STORE_" in caught.value.message


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVERIE_STORE_SECRET_KEY", "hush")
    assert "hush" not in repr(read())


def test_secrets_come_from_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush\n")
    settings = read("--store-secret-key-file", str(secret))
    assert settings.store_secret_key.get_secret_value() == "hush"


def test_a_secret_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="missing-file"):
        read("--store-secret-key-file", str(tmp_path / "missing-file"))


def test_an_empty_secret_file_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("\n")
    with pytest.raises(InvalidArgumentError, match="is empty"):
        read("--store-secret-key-file", str(secret))


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "example.org"])  # noqa: S104  # refused is the point
def test_listening_beyond_loopback_is_refused(host: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--insecure"):
        read("--host", host)


def test_listening_beyond_loopback_can_be_insisted_on() -> None:
    assert read("--host", "0.0.0.0", "--insecure").host == "0.0.0.0"  # noqa: S104  # insisted on


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "::1", "[::1]"])
def test_loopback_has_many_names(host: str) -> None:
    assert is_loopback(host)
