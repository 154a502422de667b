"""The limits of image files. Without torch, so that settings and requests can be checked before it is there."""

DEFAULT_MAX_PIXELS = 100_000_000
"""100 megapixels: 300 MB when decoded."""

MAX_FILE_BYTES = 256 * 1024 * 1024
"""Larger files are refused unread."""
