"""Store reads and writes through our layer against the bare `minio` client, same objects, same server, in turn."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from minio import Minio
from reverie_common.storage.seaweed import Seaweed

from tests.bench.report import Figure, interleaved, median_ratio

MIB = 1024 * 1024
SIZES_MIB = (4, 16)
# A read takes 5 to 20 ms, and single ones vary by half on a busy machine.
READ_ROUNDS, WRITE_ROUNDS = 60, 20


def measure() -> Iterator[Figure]:
    """Yield the ratio of rates, ours / bare minio: 1.0 is the same speed, more is faster."""
    with tempfile.TemporaryDirectory() as folder:
        server = Seaweed(Path(folder))
        server.start()
        try:
            yield from _measure(server)
        finally:
            server.stop()


def _measure(server: Seaweed) -> Iterator[Figure]:
    ours = server.open_store()
    bare = Minio(server.endpoint, access_key=server.access_key, secret_key=server.secret_key, secure=False)
    numbers = count()
    for size_mib in SIZES_MIB:
        body = os.urandom(size_mib * MIB)

        def put_ours(body: bytes = body) -> None:
            ours.create(f"bench/ours/{next(numbers)}", body)

        def put_bare(body: bytes = body) -> None:
            key = f"bench/bare/{next(numbers)}"
            bare.put_object(server.bucket, key, io.BytesIO(body), len(body), part_size=max(len(body), 5 * MIB))

        yield _ratio(f"store PUT {size_mib} MiB, rate against bare minio", put_ours, put_bare, WRITE_ROUNDS)
        key = f"bench/get/{size_mib}"
        ours.create(key, body)
        digest = hashlib.sha256(body).hexdigest()
        get_bare = partial(_get_bare, bare, server.bucket, key)
        yield _ratio(
            f"store GET {size_mib} MiB, rate against bare minio", partial(ours.get, key), get_bare, READ_ROUNDS
        )
        yield _ratio(
            f"store GET {size_mib} MiB with its digest checked, against bare minio and sha256",
            partial(ours.get, key, sha256=digest),
            lambda get=get_bare: hashlib.sha256(get()).hexdigest(),  # type: ignore[misc]  # mypy cannot type defaults
            READ_ROUNDS,
        )


def _get_bare(client: Minio, bucket: str, key: str) -> bytes:
    response = client.get_object(bucket, key)
    try:
        return bytes(response.data)
    finally:
        response.close()
        response.release_conn()


def _ratio(name: str, ours: Callable[[], object], bare: Callable[[], object], rounds: int) -> Figure:
    our_seconds, bare_seconds = interleaved([ours, bare], rounds=rounds)
    return Figure(name=name, value=median_ratio(bare_seconds, our_seconds), unit="ratio", at_least=0.9)
