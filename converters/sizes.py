"""Bytes for people."""

from rich import filesize


def size(count: int) -> str:
    """For example ``1.52 GB``, in units of 1000."""
    return filesize.decimal(count, precision=2)
