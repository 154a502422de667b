"""The object store and everything that decides what its bytes mean: keys, tensors, the codec and references.

Only safetensors, protobuf and JSON are ever read back; a reader that has a digest checks it.

Names are imported when they are first asked for: a program that only packs tensors needs neither minio nor protobuf.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reverie_common.storage.codec import compress, decompress
    from reverie_common.storage.memory import MemoryStore
    from reverie_common.storage.refs import (
        get_object,
        get_tensor,
        put_object,
        put_tensor,
        tensor_ref_if_present,
    )
    from reverie_common.storage.s3 import S3Store, open_store
    from reverie_common.storage.store import JSON_MEDIA_TYPE, OBJECT_MEDIA_TYPE, ObjectInfo, ObjectStore
    from reverie_common.storage.tensors import RawTensor, pack_tensors, read_metadata, unpack_tensors

__all__ = [
    "JSON_MEDIA_TYPE",
    "OBJECT_MEDIA_TYPE",
    "MemoryStore",
    "ObjectInfo",
    "ObjectStore",
    "RawTensor",
    "S3Store",
    "compress",
    "decompress",
    "get_object",
    "get_tensor",
    "open_store",
    "pack_tensors",
    "put_object",
    "put_tensor",
    "read_metadata",
    "tensor_ref_if_present",
    "unpack_tensors",
]

_NAMES_OF_MODULE = {
    "codec": ("compress", "decompress"),
    "memory": ("MemoryStore",),
    "refs": ("get_object", "get_tensor", "put_object", "put_tensor", "tensor_ref_if_present"),
    "s3": ("S3Store", "open_store"),
    "store": ("JSON_MEDIA_TYPE", "OBJECT_MEDIA_TYPE", "ObjectInfo", "ObjectStore"),
    "tensors": ("RawTensor", "pack_tensors", "read_metadata", "unpack_tensors"),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    content = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
    globals()[name] = content
    return content
