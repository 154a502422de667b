"""Settings of the sampler: what is refused, and the names of the variables."""

import pytest
from reverie_common.errors import InvalidArgumentError
from reverie_sampler.settings import SamplerSettings


def test_reads_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVERIE_SAMPLER_ENCODERS", "a:1,b:2")
    settings = SamplerSettings.from_command_line(["--checkpoint", "somewhere"])
    assert (settings.encoders, settings.port, settings.metrics_port) == (("a:1", "b:2"), 50054, 9104)


def test_tells_every_wrong_field_at_once() -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        SamplerSettings.from_command_line(["--encoders", "", "--max-adapters", "0", "--dtype", "float16"])
    fields = {violation.field for violation in refusal.value.violations}
    assert fields >= {"checkpoint", "max_adapters", "dtype"}


def test_takes_every_precision_and_refuses_others_by_name() -> None:
    settings = SamplerSettings.from_command_line(["--checkpoint", "somewhere", "--precision", "nf4-bnb"])
    assert settings.precision == "nf4-bnb"
    with pytest.raises(InvalidArgumentError, match=r"'fp8-native' is not supported: .* use 'fp8wo-torchao'"):
        SamplerSettings.from_command_line(["--checkpoint", "somewhere", "--precision", "fp8-native"])
