"""The codec loses nothing, shrinks what it is for, and refuses what is damaged or too large."""

import struct

import numpy as np
import pytest
from reverie_common.errors import IntegrityError, InvalidArgumentError
from reverie_common.storage import compress, decompress
from reverie_common.storage.codec import HEADER_BYTES, MAGIC


def bfloat16_like(num_values: int) -> bytes:
    """Bytes of normally distributed bfloat16 numbers, as a text encoder gives them."""
    values = np.random.Generator(np.random.Philox(7)).normal(size=num_values).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 255, 256, 257, 65_535, 65_536, 1_000_001])
def test_gives_back_bodies_of_any_length(length: int) -> None:
    body = np.random.Generator(np.random.Philox(length)).bytes(length)
    assert decompress(compress(body)) == body


def test_gives_back_runs_and_patterns() -> None:
    body = b"\x00" * 1001 + b"ab" * 500 + bytes(range(256)) * 3
    assert decompress(compress(body)) == body


def test_shrinks_bfloat16_numbers_at_least_1_4_times() -> None:
    body = bfloat16_like(500_000)
    assert len(body) / len(compress(body)) > 1.4


def test_same_body_gives_same_bytes() -> None:
    body = bfloat16_like(1000)
    assert compress(body) == compress(body)


def test_passes_on_what_it_did_not_make() -> None:
    body = b"\x40\x00\x00\x00\x00\x00\x00\x00{}"
    assert decompress(body) is body


def test_a_compressed_body_compresses_again() -> None:
    once = compress(bfloat16_like(100))
    assert decompress(compress(once)) == once


def test_refuses_a_body_that_claims_too_much() -> None:
    bomb = compress(b"\x00" * 1_000_000)
    with pytest.raises(IntegrityError) as caught:
        decompress(bomb, max_size_bytes=999_999)
    assert caught.value.reason == "MALFORMED_COMPRESSED_OBJECT"


def test_refuses_a_frame_that_is_larger_than_the_header_says() -> None:
    body = compress(b"\x00" * 1_000_000)
    forged = MAGIC + struct.pack("<Q", 10) + body[HEADER_BYTES:]
    with pytest.raises(IntegrityError):
        decompress(forged)


@pytest.mark.parametrize("cut", [8, 12, 16, 40, 100])
def test_refuses_a_truncated_body(cut: int) -> None:
    with pytest.raises(IntegrityError):
        decompress(compress(bfloat16_like(1000))[:cut])


def test_refuses_bytes_behind_the_frame() -> None:
    with pytest.raises(IntegrityError):
        decompress(compress(b"abcd") + b"more")


def test_refuses_to_compress_what_could_not_be_read_back() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        compress(b"x" * 11, max_size_bytes=10)
    assert caught.value.reason == "OBJECT_TOO_LARGE"
