"""Settings of the encoder service."""

import pytest
from pydantic import ValidationError
from reverie_common.errors import InvalidArgumentError
from reverie_encoder.settings import EncoderSettings


def test_holds_all_four_unless_told_otherwise() -> None:
    settings = EncoderSettings.from_command_line(["--checkpoint", "x"])
    assert settings.encoders == ("clip_l", "clip_g", "t5", "llama")
    assert (settings.port, settings.metrics_port, settings.num_threads) == (50051, 9101, 1)


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVERIE_ENCODER_ENCODERS", "t5")
    monkeypatch.setenv("REVERIE_ENCODER_DEVICE", "cuda:1")
    settings = EncoderSettings.from_command_line(["--checkpoint", "x", "--encoders", "llama,clip_l,llama"])
    assert settings.encoders == ("llama", "clip_l")
    assert settings.device_of("llama") == "cuda:1"


def test_an_encoder_may_have_its_own_device_and_precision() -> None:
    flags = ["--checkpoint=x", "--llama-device=cuda:0", "--precision=t5=int8-quanto,llama=nf4-bnb"]
    settings = EncoderSettings.from_command_line(flags)
    assert [settings.device_of(name) for name in ("llama", "t5")] == ["cuda:0", "cpu"]
    assert [settings.precision_of(name) for name in ("llama", "t5", "clip_g")] == [
        "nf4-bnb",
        "int8-quanto",
        "no_change",
    ]


def test_one_precision_is_for_all() -> None:
    settings = EncoderSettings.from_command_line(["--checkpoint=x", "--precision=int8-torchao"])
    assert [settings.precision_of(name) for name in ("llama", "clip_l")] == ["int8-torchao"] * 2


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("int7", "'int7' is not known; use one of no_change, int8-quanto"),
        ("t5=int8-sdnq", "'int8-sdnq' is not supported: .* use 'int8-quanto'"),
        ("t6=int8-quanto", "'t6=int8-quanto' is not ENCODER=PRECISION with one of clip_l,clip_g,t5,llama"),
        ("t5=int8-quanto,nf4-bnb", "'nf4-bnb' is not ENCODER=PRECISION"),
        ("llama=fp8-torchao", "precision of llama: 'fp8-torchao' needs a cuda device, not 'cpu'; use 'fp8wo-torchao'"),
    ],
)
def test_refuses_precisions_that_cannot_be(precision: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        EncoderSettings.from_command_line(["--checkpoint=x", f"--precision={precision}"])


def test_a_device_of_its_own_decides_what_an_encoder_can_have() -> None:
    flags = ["--checkpoint=x", "--precision=llama=fp8-torchao", "--llama-device=cuda:0"]
    assert EncoderSettings.from_command_line(flags).precision_of("llama") == "fp8-torchao"


@pytest.mark.parametrize("encoders", [(), ("clip_x",), ("clip_l", "CLIP_G")])
def test_refuses_encoders_that_do_not_exist(encoders: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError, match="clip_l,clip_g,t5,llama"):
        EncoderSettings(checkpoint="x", encoders=encoders)


def test_every_wrong_flag_is_named_at_once() -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        EncoderSettings.from_command_line(["--encoders=x", "--dtype=float16", "--max-batch-size=0"])
    fields = {violation.field for violation in refusal.value.violations}
    assert fields == {"checkpoint", "encoders", "dtype", "max_batch_size"}


def test_results_in_memory_are_bounded_by_two_batches() -> None:
    limits = EncoderSettings(checkpoint="x", max_batch_size=16).batch_limits()
    assert (limits.max_batch_size, limits.max_held) == (16, 32)
