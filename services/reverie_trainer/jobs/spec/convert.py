"""Moving between messages of the contract and dataclasses whose fields have the same names.

A field that the message does not give keeps the dataclass's default; None in a dataclass is a field that is not given.
"""

from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_type_hints

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Record = TypeVar("Record")


def from_message(message: Message, record_class: type[Record]) -> Record:
    """Return the dataclass that a message describes."""
    given = {}
    for name, record_type in _record_types(cast(Hashable, record_class)).items():
        descriptor = _descriptor(message, name)
        if descriptor is not None and _is_given(message, descriptor):
            given[name] = _value(getattr(message, name), descriptor, record_type)
    return record_class(**given)


def fill_message(message: Message, record: Any) -> None:
    """Set every field of a message that a dataclass has a value for."""
    for name in _record_types(cast(Hashable, type(record))):
        descriptor = _descriptor(message, name)
        value = getattr(record, name)
        if descriptor is None or value is None:
            continue
        if _is_map(descriptor):
            _fill_map(getattr(message, name), value)
        elif descriptor.is_repeated:
            _fill_list(getattr(message, name), value)
        elif descriptor.message_type is not None:
            getattr(message, name).SetInParent()
            fill_message(getattr(message, name), value)
        else:
            setattr(message, name, value)


@cache
def _record_types(record_class: Any) -> dict[str, type | None]:
    """The fields of a dataclass, each with the dataclass that it is made of, None for plain values."""
    hints = get_type_hints(record_class)
    return {item.name: _dataclass_in(hints[item.name]) for item in fields(record_class)}


def _dataclass_in(hint: Any) -> type | None:
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next((found for found in map(_dataclass_in, get_args(hint)) if found is not None), None)


def _descriptor(message: Message, name: str) -> FieldDescriptor | None:
    return cast("FieldDescriptor | None", message.DESCRIPTOR.fields_by_name.get(name))


def _is_map(descriptor: FieldDescriptor) -> bool:
    return descriptor.message_type is not None and bool(descriptor.message_type.GetOptions().map_entry)


def _is_given(message: Message, descriptor: FieldDescriptor) -> bool:
    if descriptor.is_repeated:
        return len(getattr(message, descriptor.name)) > 0
    return not descriptor.has_presence or message.HasField(descriptor.name)


def _value(content: Any, descriptor: FieldDescriptor, record_type: type | None) -> Any:
    if _is_map(descriptor):
        # Protobuf maps have no order; sorting makes the choice between two patterns that match one module reproducible.
        return {key: _item(content[key], record_type) for key in sorted(content)}
    if descriptor.is_repeated:
        return tuple(_item(item, record_type) for item in content)
    return _item(content, record_type)


def _item(content: Any, record_type: type | None) -> Any:
    return content if record_type is None else from_message(content, record_type)


def _fill_map(target: Any, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if is_dataclass(value):
            target[key].SetInParent()
            fill_message(target[key], value)
        else:
            target[key] = value


def _fill_list(target: Any, values: Any) -> None:
    for value in values:
        if is_dataclass(value):
            fill_message(target.add(), value)
        else:
            target.append(value)
