"""The object store and everything that decides what its bytes mean: keys, tensors, the codec and references.

Only safetensors, protobuf and JSON are ever read back; a reader that has a digest checks it.
"""

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
