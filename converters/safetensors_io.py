"""Safetensors without trust: headers checked before anything is read, shards written as a stream.

The official library loads and saves whole files; a converter needs the header alone (to plan), one tensor
at a time (to bound memory) and a file whose header is written before its data exist.
"""

import ctypes
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converters.config_json import is_unicode
from vllm_sparse.errors import FormatError

# The format's own limit; a real header of a 1,000-layer model is far below it.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSION = 1 << 40
MAX_RANK = 8
# Of one system call; a full disk or a signal is noticed in between.
_WRITE_BYTES = 64 << 20
# From linux/fs.h.
_SYNC_FILE_RANGE_WRITE = 2

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that is (or will be) in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor's place in a shard: ``offset`` is absolute, in bytes."""

    path: Path
    offset: int


def _check_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise FormatError(f"the name {key!r} appears twice in the header")
        if not is_unicode(key):
            raise FormatError(f"the name {key!r} is not valid Unicode")
        seen[key] = value
    return seen


def _parse_spec(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """``(spec, begin, end)`` of one header entry, sizes checked before anything is allocated."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise FormatError(f"tensor {name!r}: the header entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"tensor {name!r}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    whole = (
        all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in shape) if isinstance(shape, list) else False
    )
    if not whole or len(shape) > MAX_RANK:
        raise FormatError(f"tensor {name!r}: absurd shape {str(shape)[:80]}")
    if not (
        isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)
    ):
        raise FormatError(f"tensor {name!r}: data_offsets must be two non-negative integers")
    spec = TensorSpec(name, DTYPES[dtype], tuple(shape))
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise FormatError(
            f"tensor {name!r}: {dtype} {shape} needs {spec.nbytes} bytes, but data_offsets give {end - begin}"
        )
    return spec, begin, end


def _check_layout(spans: Sequence[tuple[int, int, str]], data_bytes: int) -> None:
    """Tensors must tile the data section: no overlap, no hole, nothing missing or left over."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin < position:
            raise FormatError(f"tensor {name!r} overlaps the tensor stored before it")
        if begin > position:
            raise FormatError(f"{begin - position} bytes before tensor {name!r} belong to no tensor")
        position = end
    if position > data_bytes:
        raise FormatError(
            f"the file is truncated: its tensors need {position} bytes of data, it holds {data_bytes}"
        )
    if position < data_bytes:
        raise FormatError(f"{data_bytes - position} bytes after the last tensor belong to no tensor")


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Parse and check a safetensors header; the data are not touched.

    Returns:
        ``({name: place}, metadata)``, tensors in file order.

    Raises:
        FormatError: not a safetensors file, truncated, or a header that does not describe its file.
    """
    try:
        return _read_header(path)
    except FormatError as error:
        raise FormatError(f"{path}: {error}. Fetch the file again or rewrite the checkpoint.") from error


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise FormatError(f"not a safetensors file: only {size} bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8 or length > MAX_HEADER_BYTES:
            raise FormatError(
                f"not a safetensors file, or truncated: the header claims {length} bytes, the file has "
                f"{size} "
                f"(headers above {MAX_HEADER_BYTES} bytes are refused)"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_check_names)
    except (ValueError, RecursionError) as error:
        # ValueError: not UTF-8, not JSON, or a number of thousands of digits.
        raise FormatError(f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise FormatError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("__metadata__ is not a JSON object of strings")
    found: list[tuple[int, int, TensorSpec]] = []
    for name, entry in header.items():
        spec, begin, end = _parse_spec(name, entry)
        found.append((begin, end, spec))
    found.sort(key=lambda item: item[:2])
    _check_layout([(begin, end, spec.name) for begin, end, spec in found], size - 8 - length)
    infos = {
        spec.name: TensorInfo(spec.name, spec.dtype, spec.shape, path, 8 + length + begin)
        for begin, _, spec in found
    }
    return infos, metadata


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor as a private memory map: pages come in as they are used and can be dropped again.

    Writing to the result never reaches the file.
    """
    if info.numel == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    # Map from a page boundary: torch maps whole files only, numpy any offset.
    import numpy as np

    raw = np.memmap(info.path, dtype=np.uint8, mode="c", offset=info.offset, shape=(info.nbytes,))
    flat = torch.from_numpy(np.asarray(raw))
    if info.offset % max(info.dtype.itemsize, 8):
        flat = flat.clone()
    return flat.view(info.dtype).reshape(info.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def header_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The header of a file holding ``specs`` in this order, padded so that the data are 8-byte aligned."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Specs in an order that keeps every tensor aligned to its element: widest elements first."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


@cache
def _sync_file_range() -> Any:
    """Linux's call of that name; None where the C library has none."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


def start_writeback(handle: int) -> None:
    """Have the kernel begin to write a file's changed pages, without waiting; a later fsync makes it sure."""
    call = _sync_file_range()
    if call is not None:
        call(handle, 0, 0, _SYNC_FILE_RANGE_WRITE)


class ShardWriter:
    """Writes one safetensors file whose layout is known before its data.

    Tensors may arrive in any order; each goes to its place. ``sha256`` is taken from the finished file's
    bytes by :meth:`close`, which also syncs them to disk.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        self.path = path
        self._places: dict[str, tuple[TensorSpec, int]] = {}
        head = header_bytes(specs, metadata)
        position = len(head)
        for spec in specs:
            self._places[spec.name] = (spec, position)
            position += spec.nbytes
        self.nbytes = position
        self._file = path.open("w+b", buffering=0)
        try:
            # Reserves the space, so that a full disk is noticed before any work is done.
            if hasattr(os, "posix_fallocate") and position:
                os.posix_fallocate(self._file.fileno(), 0, position)
            self._write(memoryview(head), 0)
        except OSError:
            self._file.close()
            raise

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place.

        Raises:
            FormatError: the tensor is not what the plan said, or is not in it.
        """
        _, offset = self._take(name, tensor.dtype, tuple(tensor.shape))
        self._write(tensor_bytes(tensor), offset)

    def put_rows(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Callable[[int, memoryview], None]:
        """Write one tensor in pieces, from any thread.

        Args:
            name: the tensor.
            dtype: of its values.
            shape: its whole shape.

        Returns:
            ``put(row, data)``: writes the bytes of whole rows, beginning with ``row``. All rows must come.

        Raises:
            FormatError: the tensor is not what the plan said, or is not in it.
        """
        spec, offset = self._take(name, dtype, shape)
        row_bytes = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
        return lambda row, data: self._write(data, offset + row * row_bytes)

    def _write(self, data: memoryview, offset: int) -> None:
        """Positioned writes share no position, so that threads do not disturb each other."""
        while data:
            count = os.pwrite(self._file.fileno(), data[:_WRITE_BYTES], offset)
            data, offset = data[count:], offset + count

    def _take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[TensorSpec, int]:
        if name not in self._places:
            raise FormatError(f"{self.path.name}: tensor {name!r} is not planned, or was written twice")
        spec, offset = self._places.pop(name)
        if dtype != spec.dtype or shape != spec.shape:
            raise FormatError(
                f"{self.path.name}: tensor {name!r} is {dtype} {list(shape)}, "
                f"planned as {spec.dtype} {list(spec.shape)}"
            )
        return spec, offset

    def close(self) -> str:
        """Finish the file and return its sha256.

        Raises:
            FormatError: a planned tensor was never written.
        """
        if self._places:
            raise FormatError(f"{self.path.name}: never written: {', '.join(list(self._places)[:5])}")
        # The disk writes while the processor hashes.
        start_writeback(self._file.fileno())
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        os.fsync(self._file.fileno())
        self._file.close()
        return digest

    def abort(self) -> None:
        """Close without finishing."""
        self._file.close()


def iter_files(folder: Path, suffix: str) -> Iterator[Path]:
    """Regular files of ``folder`` ending in ``suffix``, by name."""
    for path in sorted(folder.iterdir()):
        if path.name.endswith(suffix) and path.is_file():
            yield path
