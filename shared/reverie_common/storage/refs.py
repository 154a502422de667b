"""Writing things to the store and getting a reference; following a reference and getting the thing.

A tensor object has a small companion, `<key>.ref`, which holds its TensorRef as JSON and is written after it. One read
of 300 bytes then answers "is it there, and what is it", where a HEAD knows neither dtype, shape nor digest and reading
the object itself would move 34 MB for a caption.
"""

import hashlib
from collections.abc import Mapping

from google.protobuf.json_format import MessageToJson, Parse, ParseError
from reverie.common.v1.common_pb2 import ObjectRef, TensorRef

from reverie_common.errors import IntegrityError, InvalidArgumentError, ObjectNotFoundError
from reverie_common.storage.codec import compress, decompress
from reverie_common.storage.keys import reference_key
from reverie_common.storage.store import JSON_MEDIA_TYPE, OBJECT_MEDIA_TYPE, Body, ObjectStore
from reverie_common.storage.tensors import RawTensor, pack_tensors, read_metadata, unpack_tensors

MAX_REFERENCE_BYTES = 64 * 1024

EXACT = ""
"""TensorRef.encoding of values that are stored as they are."""

INT8_GROUPS = "int8-groups-32"
"""TensorRef.encoding of values that are stored by int8_groups.py."""


def put_object(store: ObjectStore, key: str, body: Body, media_type: str = OBJECT_MEDIA_TYPE) -> ObjectRef:
    """Create an object and refer to it; if the key was taken, refer to what is there. Blocks; safe to repeat."""
    stored = body if store.create(key, body, media_type=media_type) else store.get(key)
    size_bytes, sha256 = _measure(stored)
    return ObjectRef(uri=store.uri(key), size_bytes=size_bytes, sha256=sha256, media_type=media_type)


def get_object(store: ObjectStore, ref: ObjectRef, *, max_size_bytes: int | None = None) -> bytes:
    """Read what a reference names. Blocks.

    Raises:
        ObjectNotFoundError: it is gone.
        IntegrityError: it is not what was written.
        InvalidArgumentError: the URI is of another store, or the object is larger than max_size_bytes.
    """
    return store.get(store.key_of(ref.uri), sha256=ref.sha256 or None, max_size_bytes=max_size_bytes)


def put_tensor(
    store: ObjectStore,
    key: str,
    name: str,
    tensor: RawTensor,
    *,
    compressed: bool,
    encoding: str = EXACT,
    has_companion: bool = True,
) -> TensorRef:
    """Create a safetensors object of one tensor and refer to it. Blocks; safe to repeat.

    If another process wrote the key first, the reference is to that object: two computations of one thing may differ in
    the last bit, and only one of them can be what everybody uses. A key must tell encodings apart.

    Args:
        compressed: without loss, by codec.py.
        encoding: EXACT or INT8_GROUPS.
        has_companion: whether to write the companion, by which tensor_ref_if_present finds the tensor.
    """
    tensors, metadata = _encode(name, tensor, encoding)
    body = pack_tensors(tensors, metadata)
    body = compress(body) if compressed else body
    if not store.create(key, body):
        known = tensor_ref_if_present(store, key)
        if known is not None:
            return known
        body = store.get(key)
        tensor = _decode(body, TensorRef(name=name, dtype=tensor.dtype, encoding=encoding), key)
        metadata = read_metadata(decompress(body))
    size_bytes, sha256 = _measure(body)
    ref = TensorRef(
        uri=store.uri(key),
        name=name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        size_bytes=size_bytes,
        sha256=sha256,
        encoding=encoding,
        relative_error=float(metadata.get("relative_error", 0.0)),
    )
    if has_companion:
        store.create(reference_key(key), MessageToJson(ref, indent=None).encode(), media_type=JSON_MEDIA_TYPE)
    return ref


def get_tensor(store: ObjectStore, ref: TensorRef) -> RawTensor:
    """Read the tensor that a reference names, in its dtype, however it is stored. Blocks.

    Exact and uncompressed data is a view of the object's bytes.

    Raises:
        ObjectNotFoundError: it is gone.
        IntegrityError: its digest, name, dtype or shape is not that of the reference.
        InvalidArgumentError: its encoding is unknown here.
    """
    key = store.key_of(ref.uri)
    tensor = _decode(store.get(key, sha256=ref.sha256 or None), ref, key)
    if tensor.dtype != ref.dtype or tensor.shape != tuple(ref.shape):
        raise IntegrityError(
            f"tensor {ref.name} of {key} is {tensor.dtype} {list(tensor.shape)}, "
            f"expected {ref.dtype} {list(ref.shape)}",
            metadata={"key": key},
        )
    return tensor


def tensor_ref_if_present(store: ObjectStore, key: str) -> TensorRef | None:
    """Refer to a tensor that put_tensor wrote; None if there is none. Blocks for one small read."""
    try:
        text = store.get(reference_key(key), max_size_bytes=MAX_REFERENCE_BYTES)
        return Parse(text, TensorRef())
    except ObjectNotFoundError:
        return None
    except (ParseError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"object {reference_key(key)} is not a reference: {error}; delete it and let it be made again",
            metadata={"key": reference_key(key)},
        ) from error


def _measure(body: Body) -> tuple[int, str]:
    return memoryview(body).nbytes, hashlib.sha256(body).hexdigest()


def _encode(name: str, tensor: RawTensor, encoding: str) -> tuple[Mapping[str, RawTensor], dict[str, str]]:
    """The tensors and the metadata of an object."""
    if encoding == EXACT:
        return {name: tensor}, {}
    _require_known(encoding)
    from reverie_common.storage import int8_groups  # numpy

    encoded = int8_groups.encode(tensor)
    return encoded.tensors(name), {"encoding": encoding, "relative_error": repr(encoded.relative_error)}


def _decode(body: bytes, ref: TensorRef, key: str) -> RawTensor:
    tensors = unpack_tensors(decompress(body))
    if ref.encoding in (EXACT, "exact"):
        return _named(tensors, ref.name, key)
    _require_known(ref.encoding)
    from reverie_common.storage import int8_groups  # numpy

    values = _named(tensors, int8_groups.values_name(ref.name), key)
    return int8_groups.decode(values, _named(tensors, int8_groups.scales_name(ref.name), key), ref.dtype)


def _require_known(encoding: str) -> None:
    if encoding != INT8_GROUPS:
        raise InvalidArgumentError(
            f"encoding {encoding[:40]!r} is unknown; known are exact and {INT8_GROUPS}: the tensor was written by a "
            "newer version, use that one",
            reason="UNKNOWN_ENCODING",
        )


def _named(tensors: Mapping[str, RawTensor], name: str, key: str) -> RawTensor:
    if name not in tensors:
        raise IntegrityError(
            f"object {key} has no tensor {name!r}, only {', '.join(sorted(tensors)) or 'none'}", metadata={"key": key}
        )
    return tensors[name]
