"""Frozen settings of a process, read once from the environment and the command line.

`Settings.from_command_line(argv)` is the only reader of the environment; constructing a settings class directly reads
nothing, so that tests and embedders say everything that they mean.

A flag wins over the environment, which wins over the default. Server fields of the encoder are REVERIE_ENCODER_PORT and
so on; store fields are REVERIE_STORE_... for every service. Secrets come from the environment or from a file, never
from a flag, because every user of a machine can read another process's command line.
"""

import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    CliSuppress,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from reverie_common.errors import FieldViolation, InvalidArgumentError


def _split_commas(value: object) -> object:
    """`a,b` from the environment; the command line may also repeat the flag and gives a list."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        return value
    return tuple(part.strip() for word in words for part in word.split(",") if part.strip())


CommaSeparated = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]
"""A tuple of words, written `a,b` in the environment and on the command line."""


class ServiceSettings(BaseSettings):
    """Base of the settings of every process."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_ignore_empty=True,
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        hide_input_in_errors=True,
        validate_default=True,
    )

    secret_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that no flag may set."""

    @classmethod
    def from_command_line(cls, arguments: Sequence[str] | None = None) -> Self:
        """Read the environment and the command line, once, at the start of a process.

        Prints help and ends with status 0 on --help, and with status 2 on an unknown flag. `arguments` is without the
        program's name; None means those of this process.

        Raises:
            InvalidArgumentError: with every wrong field at once.
        """
        flags = list(sys.argv[1:] if arguments is None else arguments)
        cls._refuse_secret_flags(flags)
        values = {**_store_environment(cls), **EnvSettingsSource(cls)(), **cls._read_flags(flags)}
        try:
            return cls(**values)
        except ValidationError as error:
            raise _invalid_settings(error, cls) from None

    @classmethod
    def _read_flags(cls, flags: list[str]) -> dict[str, Any]:
        program = Path(sys.argv[0]).name
        if program == "__main__.py":
            program = f"python -m {Path(sys.argv[0]).parent.name}"
        return CliSettingsSource(cls, cli_prog_name=program, cli_parse_args=flags)()

    @classmethod
    def _refuse_secret_flags(cls, flags: Sequence[str]) -> None:
        for flag in flags:
            field = flag.split("=", 1)[0].lstrip("-").replace("-", "_")
            if flag.startswith("--") and field in cls.secret_fields:
                raise InvalidArgumentError(
                    f"--{field.replace('_', '-')} is refused: other users can read a command line; "
                    f"set {environment_name(cls, field)} or --{field.replace('_', '-')}-file",
                    reason="SECRET_ON_COMMAND_LINE",
                    metadata={"field": field},
                )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from the constructor only; see from_command_line for the rest."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


def environment_name(settings_class: type[ServiceSettings], field: str) -> str:
    """Name of the environment variable that sets a field."""
    if field in StoreSettings.model_fields:
        return f"REVERIE_{field.upper()}"
    return f"{settings_class.model_config.get('env_prefix', '')}{field.upper()}"


def _store_environment(settings_class: type[ServiceSettings]) -> dict[str, str]:
    """REVERIE_STORE_... is the same for every service, whatever the prefix of its own fields."""
    fields = [field for field in settings_class.model_fields if field in StoreSettings.model_fields]
    names = {field: environment_name(settings_class, field) for field in fields}
    return {field: os.environ[name] for field, name in names.items() if os.environ.get(name)}


def _invalid_settings(error: ValidationError, settings_class: type[ServiceSettings]) -> InvalidArgumentError:
    violations = [_violation(details, settings_class) for details in error.errors(include_url=False)]
    return InvalidArgumentError(
        "settings are wrong: " + "; ".join(violation.description for violation in violations),
        reason="INVALID_SETTINGS",
        violations=violations,
    )


def _violation(details: Mapping[str, Any], settings_class: type[ServiceSettings]) -> FieldViolation:
    field = ".".join(str(part) for part in details["loc"])
    message = str(details["msg"]).removeprefix("Value error, ")
    if not details["loc"]:
        return FieldViolation(field="", description=message)
    top = str(details["loc"][0])
    return FieldViolation(
        field=field,
        description=f"--{top.replace('_', '-')} ({environment_name(settings_class, top)}): {message}",
    )


class StoreSettings(ServiceSettings):
    """Where the object store is, and who we are to it."""

    secret_fields: ClassVar[frozenset[str]] = frozenset({"store_access_key", "store_secret_key"})

    store_endpoint: str = "127.0.0.1:8333"
    """Object store, `host:port` (plain HTTP) or `http(s)://host[:port]`."""

    store_bucket: str = Field(default="reverie", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    """Bucket that holds everything; it must exist."""

    store_region: str = "us-east-1"
    """Region that requests are signed for; SeaweedFS and MinIO take any."""

    store_access_key: CliSuppress[SecretStr] = SecretStr("")
    """Access key; never a flag."""

    store_secret_key: CliSuppress[SecretStr] = SecretStr("")
    """Secret key; never a flag."""

    store_access_key_file: Path | None = None
    """File that holds the access key, for instance a mounted Kubernetes secret."""

    store_secret_key_file: Path | None = None
    """File that holds the secret key."""

    store_public_endpoint: str | None = None
    """Endpoint written into download and upload URLs, where clients reach the store by another name than services."""

    store_retry_seconds: float = Field(default=60.0, ge=0)
    """How long a request is repeated while the store does not answer, so that a restart of it is survived."""

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        read = dict(values)
        for field in ("store_access_key", "store_secret_key"):
            path = values.get(f"{field}_file")
            if path is not None and not read.get(field):
                read[field] = _read_secret(field, Path(path))
        return read


def _read_secret(field: str, path: Path) -> str:
    try:
        secret = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{field}_file {path} cannot be read: {error}") from error
    if not secret:
        raise ValueError(f"{field}_file {path} is empty")
    return secret


class ServerSettings(ServiceSettings):
    """How a service listens, logs and stops."""

    host: str = "127.0.0.1"
    """Address that gRPC and metrics listen on."""

    port: int = Field(default=0, ge=0, le=65535)
    """gRPC port; 0 takes any free one."""

    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of Prometheus /metrics; 0 takes any free one."""

    insecure: bool = False
    """Listen on an address other than loopback, although Reverie has no tokens and no TLS yet."""

    reflection: bool = True
    """Serve gRPC reflection, so that grpcurl works without our protos."""

    drain_seconds: float = Field(default=0.0, ge=0)
    """After SIGTERM, how long new calls are still served while health already says NOT_SERVING."""

    grace_seconds: float = Field(default=10.0, ge=0)
    """After draining, how long calls in flight may take to finish."""

    max_connection_age_seconds: float = Field(default=0.0, ge=0)
    """Age at which clients are asked to connect anew, so that they find new replicas; 0 means never."""

    log_format: Literal["json", "console"] = "json"
    """`json` for machines, `console` for people."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""

    ready_file: Path | None = None
    """File that is written once the service serves: JSON with pid, port and metrics_port."""

    @model_validator(mode="after")
    def _refuse_open_address(self) -> Self:
        if not self.insecure and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is not loopback and there are no tokens yet: anyone who reaches it could use this "
                "service; listen on 127.0.0.1, or pass --insecure on a trusted network"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address to listen on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
