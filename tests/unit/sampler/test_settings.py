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
