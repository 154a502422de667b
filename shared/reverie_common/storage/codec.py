"""The lossless codec for tensors of 2-byte numbers: byte shuffle, then zstd level 1.

The high bytes of neighbouring bfloat16 values are alike (sign and exponent) and the low bytes are noise, so storing
first all low bytes and then all high bytes makes Llama's hidden states 1.5-1.6 times smaller; zstd-3 and zstd-9 are
slower and no smaller.

Layout: 8 bytes of magic, 8 bytes of little-endian size of the original, then one zstd frame.
"""

import zstandard

from reverie_common.errors import IntegrityError, InvalidArgumentError

# As the length of a safetensors header this would be 3.6 EB, so no stored body is mistaken for a compressed one.
MAGIC = b"RVZSTD12"
HEADER_BYTES = len(MAGIC) + 8

# An object is one caption's or one image's tensors; the largest is 34 MB. A body that claims more is refused unread.
MAX_DECOMPRESSED_BYTES = 1 << 30


def compress(body: bytes, *, max_size_bytes: int = MAX_DECOMPRESSED_BYTES) -> bytes:
    """Compress a body without loss; the same body always gives the same bytes.

    Raises:
        InvalidArgumentError: the body is larger than max_size_bytes, which decompress would not accept.
    """
    if len(body) > max_size_bytes:
        raise InvalidArgumentError(
            f"{len(body)} bytes are above the codec's limit of {max_size_bytes}; store them uncompressed",
            reason="OBJECT_TOO_LARGE",
        )
    frame = zstandard.ZstdCompressor(level=1).compress(body[0::2] + body[1::2])
    return MAGIC + len(body).to_bytes(8, "little") + frame


def decompress(body: bytes, *, max_size_bytes: int = MAX_DECOMPRESSED_BYTES) -> bytes:
    """Give back what was compressed; a body that `compress` did not make is returned as it is.

    Memory is bounded by the declared size, which is bounded by max_size_bytes.

    Raises:
        IntegrityError: the body is damaged or claims to be larger than max_size_bytes.
    """
    if not body.startswith(MAGIC):
        return body
    size_bytes = int.from_bytes(body[len(MAGIC) : HEADER_BYTES], "little")
    if len(body) < HEADER_BYTES or size_bytes > max_size_bytes:
        raise _damaged(f"it claims {size_bytes} bytes, the limit is {max_size_bytes}")
    return _unshuffle(_inflate(memoryview(body)[HEADER_BYTES:], size_bytes), size_bytes)


def _inflate(frame: memoryview, size_bytes: int) -> bytes:
    try:
        # The frame's own claim is checked first: zstandard would allocate that much, whatever our header says.
        if zstandard.frame_content_size(frame) != size_bytes:
            raise _damaged("its frame and its header differ in size")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _damaged(str(error)) from error


def _unshuffle(shuffled: bytes, size_bytes: int) -> bytes:
    num_even = (size_bytes + 1) // 2
    body = bytearray(size_bytes)
    body[0::2] = shuffled[:num_even]
    body[1::2] = shuffled[num_even:]
    return bytes(body)


def _damaged(why: str) -> IntegrityError:
    return IntegrityError(f"a compressed object is damaged: {why}", reason="MALFORMED_COMPRESSED_OBJECT")
