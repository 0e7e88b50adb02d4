"""Bytes of a checkpoint's tensors, read from the headers alone."""

import struct
from pathlib import Path

import orjson

from vllm_sparse.errors import FormatError

_MAX_HEADER = 100 * 2**20


def checkpoint_bytes(directory: Path) -> int:
    """Bytes of all tensors in the safetensors files of a directory.

    Raises:
        FormatError: A file is truncated or not safetensors.
    """
    return sum(_tensor_bytes(path) for path in sorted(directory.glob("*.safetensors")))


def _tensor_bytes(path: Path) -> int:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            raise FormatError(f"{path}: not a complete safetensors file ({size} bytes). Copy it again.")
        try:
            header = orjson.loads(file.read(length))
        except orjson.JSONDecodeError as error:
            raise FormatError(f"{path}: its safetensors header is not JSON.") from error
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    end = max((entry["data_offsets"][1] for entry in entries), default=0)
    if 8 + length + end > size:
        raise FormatError(
            f"{path}: truncated, {size} bytes found, {8 + length + end} needed by its header. Copy it again."
        )
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)
