"""Logs of a process: one line per event, JSON for machines or coloured text for people.

Ids travel as fields (`logger.info("job began", extra={"job_id": ...})`). The request id of the RPC being served is
added to every line by itself.
"""

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the RPC that the current task serves; empty outside of one."""

# What logging itself puts on a record; everything else came by extra=.
_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

# A field of such a name is never written, whoever passes it.
_SECRET_NAME = re.compile(r"secret|password|authorization|access_key|(^|_)token$", re.IGNORECASE)

# Chatty libraries, which log at info what we log at debug.
_QUIET_LOGGERS = ("urllib3", "grpc", "httpx", "filelock", "fsspec", "PIL", "matplotlib")

# What they warn of while they are imported helps nobody: kernels of devices that this machine lacks, and each other's
# versions; two of them on handlers of their own, in the middle of our lines.
_MUTED_LOGGERS = (
    "bitsandbytes",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "torch.utils._pytree",
    "torchao",
)

_COLOURS = {"DEBUG": "\033[2m", "INFO": "\033[36m", "WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[31m"}
_PLAIN = "\033[0m"


def configure_logging(
    service: str,
    format: Literal["json", "console"] = "json",
    *,
    level: str = "info",
    stream: TextIO | None = None,
) -> None:
    """Send this process's logs to one stream, stderr unless told otherwise. Call once, at the start of a process."""
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    handler.setFormatter(JsonFormatter(service) if format == "json" else ConsoleFormatter(service, target.isatty()))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    for name in _MUTED_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)


class JsonFormatter(logging.Formatter):
    """One JSON object on each line: time, level, service, logger, message, then the event's own fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **event_fields(record),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """`12:30:05 encoder  info  message  key=value`, coloured on a terminal."""

    def __init__(self, service: str, coloured: bool) -> None:
        super().__init__()
        self._service = service
        self._coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        level = record.levelname.lower()
        if self._coloured:
            level = f"{_COLOURS.get(record.levelname, '')}{level:<7}{_PLAIN}"
        fields = "".join(f" {name}={value}" for name, value in event_fields(record).items())
        line = f"{clock} {self._service:<8} {level:<7} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def event_fields(record: logging.LogRecord) -> dict[str, Any]:
    """The fields that an event came with, secrets blanked, and the request id."""
    fields = {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}
    if request_id.get():
        fields.setdefault("request_id", request_id.get())
    return {name: "***" if _is_secret(name) else value for name, value in fields.items()}


def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None
