"""Job files: a TrainingJobSpec in YAML or JSON, with every mistake reported at once.

The file is the message's JSON form with snake_case names. Numbers may be written as strings ("4e-5"), booleans as
true/false/yes/no/1/0; null means the default. Here: names, types and integer ranges. Not here: what values mean; the
server checks that, and NaN goes to it as it is.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from reverie.training.v1.job_pb2 import TrainingJobSpec
from reverie_common.errors import FieldViolation, InvalidArgumentError, NotFoundError

from reverie_client.documents import parse

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
MOVED = {
    "algo": "the key `lokr` above it says the same; remove this line",
    "bypass_mode": "Reverie always computes LoKr in bypass mode, which is mathematically equal; remove this line",
    "lycoris_config": "write the configuration itself under adapter.lokr",
    "train_batch_size": "it is optimization.batch_size",
    "max_train_steps": "it is optimization.max_steps",
    "lr_warmup_steps": "it is optimization.lr_warmup_steps",
    "learning_rate": "it is optimization.learning_rate",
    "checkpointing_steps": "it is checkpoints.every_steps",
    "validation_steps": "it is validation.every_steps",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class JobReading:
    """What could be read of a job, and what could not."""

    name: str
    """What errors call the file or text."""
    spec: TrainingJobSpec
    """Everything that could be read; the rest has its default."""
    violations: tuple[FieldViolation, ...]
    """Unknown keys, wrong types, integers out of range."""
    suspects: frozenset[str]
    """Fields that are probably meant by what could not be read."""

    def require(self) -> TrainingJobSpec:
        """Return the job. Raises InvalidArgumentError with everything that could not be read."""
        if self.violations:
            raise self.error()
        return self.spec

    def error(self, more: Sequence[FieldViolation] = ()) -> InvalidArgumentError:
        """Return the error that says what is wrong here, and `more` that was found elsewhere in what could be read."""
        new = [found for found in more if not self._is_known(found.field)]
        count = len(self.violations) + len(new)
        return InvalidArgumentError(
            f"{count} {'field is' if count == 1 else 'fields are'} wrong in {self.name}",
            reason="INVALID_JOB_FILE",
            violations=[*self.violations, *new],
        )

    def _is_known(self, field: str) -> bool:
        """Whether a field has its default only because what was written for it could not be read."""
        wrong = {found.field for found in self.violations} | self.suspects
        return any(field == each or field.startswith((f"{each}.", f"{each}[")) for each in wrong)


def load_job_spec(source: Path | str) -> TrainingJobSpec:
    """Return the job that a file (a Path) or a text (a str) describes.

    Raises:
        NotFoundError: there is no such file.
        InvalidArgumentError: with one violation for each unknown key, wrong type and integer out of range.
    """
    return (read_job_file(source) if isinstance(source, Path) else read_job_text(source)).require()


def parse_job_spec(text: str, *, name: str = "the job") -> TrainingJobSpec:
    """Return the job that a YAML or JSON text describes; `name` is what errors call it."""
    return read_job_text(text, name=name).require()


def read_job_file(path: Path) -> JobReading:
    """Read as much of a job file as can be read. Raises NotFoundError, InvalidArgumentError where nothing can."""
    return read_job_text(_read(path), name=str(path))


def read_job_text(text: str, *, name: str = "the job") -> JobReading:
    """Read as much of a YAML or JSON text as can be read. Raises InvalidArgumentError where nothing can."""
    document = parse(text, name)
    spec = TrainingJobSpec()
    reader = _Reader()
    reader.fill(spec, document, "")
    return JobReading(name=name, spec=spec, violations=tuple(reader.violations), suspects=frozenset(reader.suspects))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise NotFoundError(f"the job file {path} does not exist; check the path", reason="NO_JOB_FILE") from None
    except OSError as error:
        raise InvalidArgumentError(f"the job file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"the job file {path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "save it as UTF-8"
        ) from error


class _Reader:
    """Copies a document into a message, collecting what is wrong."""

    def __init__(self) -> None:
        self.violations: list[FieldViolation] = []
        self.suspects: set[str] = set()

    def refuse(self, path: str, description: str) -> None:
        self.violations.append(FieldViolation(field=path or "the document", description=description))

    def fill(self, message: Message, value: Any, path: str) -> None:
        """Copy a mapping into a message, key by key."""
        descriptor = cast(Descriptor, message.DESCRIPTOR)
        if not isinstance(value, Mapping):
            self.refuse(path, f"{_shown(value)} is not a mapping; its keys are {_names(descriptor)}")
            return
        for key, entry in value.items():
            field = descriptor.fields_by_name.get(key)
            if field is None:
                near = _nearest(key, descriptor)
                self.suspects.update(_join(path, name) for name in near)
                self.refuse(_join(path, key), _unknown(key, near, descriptor))
            elif entry is not None and not self.is_second_kind(message, field, path):
                self.set_field(message, field, entry, _join(path, key))

    def is_second_kind(self, message: Message, field: FieldDescriptor, path: str) -> bool:
        """Refuse the second of several fields that exclude each other; protobuf would drop the first in silence."""
        group = field.containing_oneof
        # An `optional` field is a group of its own.
        if group is None or len(group.fields) == 1:
            return False
        first = message.WhichOneof(group.name)
        if first is not None:
            self.refuse(_join(path, field.name), f"{_join(path, first)} is given too; remove one of both")
        return first is not None

    def set_field(self, message: Message, field: FieldDescriptor, value: Any, path: str) -> None:
        """Set one field, whatever its kind."""
        target = getattr(message, field.name)
        if _is_map(field):
            self.fill_map(target, field, value, path)
        elif field.is_repeated:
            self.fill_list(target, field, value, path)
        elif field.message_type is not None:
            target.SetInParent()
            self.fill(target, value, path)
        else:
            scalar = self.scalar(field, value, path)
            if scalar is not None:
                setattr(message, field.name, scalar)

    def fill_map(self, target: Any, field: FieldDescriptor, value: Any, path: str) -> None:
        if not isinstance(value, Mapping):
            self.refuse(path, f"{_shown(value)} is not a mapping")
            return
        holds_messages = cast(Descriptor, field.message_type).fields_by_name["value"].message_type is not None
        for key, entry in value.items():
            here = f"{path}[{str(key)!r}]"
            if holds_messages:
                self.fill(target[str(key)], {} if entry is None else entry, here)
                continue
            setting = self.setting(entry, here)
            if setting is not None:
                target[str(key)] = setting

    def setting(self, value: Any, path: str) -> str | None:
        """Return the text of a setting, which may be written as the number or the truth value that it is."""
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int | float | str):
            return str(value)
        self.refuse(path, f"{_shown(value)} is not one value")
        return None

    def fill_list(self, target: Any, field: FieldDescriptor, value: Any, path: str) -> None:
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
            self.refuse(path, f"{_shown(value)} is not a list; write [{_shown(value)}]")
            return
        for index, entry in enumerate(value):
            here = f"{path}[{index}]"
            if field.message_type is not None:
                self.fill(target.add(), entry, here)
                continue
            scalar = self.scalar(field, entry, here)
            if scalar is not None:
                target.append(scalar)

    def scalar(self, field: FieldDescriptor, value: Any, path: str) -> Any:
        """Return a value in the field's type, or None after a violation."""
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            return self.text(value, path)
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self.boolean(value, path)
        if kind in RANGES:
            return self.integer(value, RANGES[kind], path)
        return self.number(value, path)

    def text(self, value: Any, path: str) -> str | None:
        if isinstance(value, str):
            return value
        self.refuse(path, f"{_shown(value)} is not text; put it in quotes")
        return None

    def boolean(self, value: Any, path: str) -> bool | None:
        if isinstance(value, bool):
            return value
        found = BOOLEANS.get(str(value).strip().lower())
        if found is None:
            self.refuse(path, f"{_shown(value)} is neither true nor false")
        return found

    def number(self, value: Any, path: str) -> float | None:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            return float(value)
        except ValueError:
            self.refuse(path, f"{_shown(value)} is not a number")
        except OverflowError:
            self.refuse(path, f"{_shown(value)} is too large for a number")
        return None

    def integer(self, value: Any, limits: tuple[int, int], path: str) -> int | None:
        whole = _whole(value)
        if whole is None:
            self.refuse(path, f"{_shown(value)} is not a whole number")
        elif not limits[0] <= whole <= limits[1]:
            self.refuse(path, f"{whole} is outside {limits[0]} to {limits[1]}")
            return None
        return whole


def _whole(value: Any) -> int | None:
    """Return 1000 for 1000, 1000.0, "1000" and "1e3"; None for what is not whole."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return int(value) if isinstance(value, int | str) else _whole_float(value)
    except ValueError:
        pass
    try:
        return _whole_float(float(value))
    except ValueError:
        return None


def _whole_float(value: float) -> int | None:
    return int(value) if math.isfinite(value) and value == int(value) else None


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _names(descriptor: Descriptor) -> str:
    return ", ".join(descriptor.fields_by_name)


def _nearest(key: Any, descriptor: Descriptor) -> list[str]:
    return difflib.get_close_matches(str(key).lower().replace("-", "_"), list(descriptor.fields_by_name), n=1)


def _unknown(key: Any, near: Sequence[str], descriptor: Descriptor) -> str:
    if near:
        return f"unknown key; did you mean {near[0]}?"
    if key in MOVED:
        return f"unknown key; {MOVED[str(key)]}"
    return f"unknown key; the keys here are {_names(descriptor)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
