"""What a stack is made of and where it lives."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from reverie_common.errors import FieldViolation, InvalidArgumentError

SERVICES = ("store", "encoder", "vae", "sampler", "trainer")
"""In the order in which they start; they stop in the reverse order."""

DEFAULT_PORTS: Mapping[str, int] = {"store": 8333, "encoder": 50051, "vae": 50052, "trainer": 50053, "sampler": 50054}
DEFAULT_METRICS_PORTS: Mapping[str, int] = {"encoder": 9101, "vae": 9102, "trainer": 9103, "sampler": 9104}

_SETTING = re.compile(r"(?P<service>[a-z]+)\.(?P<setting>[a-z][a-z0-9_-]*)=(?P<value>.*)")


def default_state_dir() -> Path:
    """Return where a stack keeps its state: REVERIE_STATE_DIR, else below XDG_STATE_HOME, by default ~/.local/state."""
    if given := os.environ.get("REVERIE_STATE_DIR", ""):
        return Path(given)
    home = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    base = Path(home) if home.startswith("/") else Path.home() / ".local" / "state"
    return base / "reverie"


def service_flags(settings: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Turn SERVICE.SETTING=VALUE into command-line flags by service.

    Raises:
        InvalidArgumentError: with every text of another form.
    """
    flags: dict[str, tuple[str, ...]] = {}
    violations = []
    for text in settings:
        match = _SETTING.fullmatch(text)
        if match is None:
            violations.append(FieldViolation(field="--set", description=f"{text!r} is not SERVICE.SETTING=VALUE"))
            continue
        name = match["setting"].replace("_", "-")
        flags[match["service"]] = (*flags.get(match["service"], ()), f"--{name}={match['value']}")
    if violations:
        raise InvalidArgumentError("a setting is wrong", violations=violations)
    return flags


@dataclass(frozen=True, kw_only=True, slots=True)
class StackOptions:
    """What to start."""

    state_dir: Path
    """Everything that the stack keeps: objects, the job database, credentials, logs."""

    checkpoint: str | None = None
    """The model: a directory, an s3:// prefix or a Hub id. None makes and uses the tiny checkpoint."""

    ports: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_PORTS))
    """Port of each service by name; 0 takes any free one, chosen once for the life of the stack."""

    metrics_ports: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_METRICS_PORTS))
    """Port of each service's Prometheus metrics; 0 takes any free one."""

    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """More command-line flags for a service, by its name."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """More environment for every process."""

    ready_timeout_seconds: float = 180.0
    """How long the services may take to load their models."""

    def __post_init__(self) -> None:
        """Refuse a service that does not exist, with InvalidArgumentError."""
        named = {*self.ports, *self.metrics_ports, *self.flags}
        violations = [
            FieldViolation(field=name, description=f"there is no service {name!r}; there are {', '.join(SERVICES)}")
            for name in sorted(named - set(SERVICES))
        ]
        if violations:
            raise InvalidArgumentError("a service of this name does not exist", violations=violations)

    def with_ephemeral_ports(self) -> "StackOptions":
        """Return the same stack on free ports."""
        return replace(
            self, ports=dict.fromkeys(DEFAULT_PORTS, 0), metrics_ports=dict.fromkeys(DEFAULT_METRICS_PORTS, 0)
        )
