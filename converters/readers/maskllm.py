"""Reader of a dense model with MaskLLM's masks: ``mask_compressed.npz`` in the same folder.

The npz maps ``<parameter>.mask`` to ``numpy.packbits(mask)``: **big-endian** bits over the flattened
tensor, the opposite order to compressed-tensors, with pad bits only at the very end. The weight is
multiplied by its mask. A mask with the wrong bit order still looks 2:4, so the file must be MaskLLM's own.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.readers.base import Entry, Loaded
from converters.readers.dense import DenseReader
from vllm_sparse.errors import FormatError

FILE = "mask_compressed.npz"
SUFFIX = ".mask"
_HEADER_BYTES = 1 << 16


def unpack_flat(bits: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Big-endian bits over a flattened tensor -> bool mask of ``shape``.

    Raises:
        FormatError: too few or too many bytes, or pad bits that are set.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if bits.dtype != np.uint8 or bits.ndim != 1 or bits.size != -(-count // 8):
        raise FormatError(
            f"a mask of {list(shape)} needs {-(-count // 8)} bytes; found {bits.dtype} {bits.shape}"
        )
    mask = np.unpackbits(bits, bitorder="big")
    if mask[count:].any():
        raise FormatError("pad bits after the last weight are set; is the mask of another model?")
    return torch.from_numpy(mask[:count].reshape(shape).view(bool))


class MaskFile:
    """An npz opened without trusting it: no pickles, no array larger than the weight it masks.

    Raises:
        FormatError: not a zip, or two members with one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except zipfile.BadZipFile as error:
            raise FormatError(f"{path.name} is not an npz file: {error}") from error
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) != len(names):
            raise FormatError(f"{path.name} holds two arrays of one name")
        self._sizes = {name: member.file_size for name, member in zip(names, members, strict=True)}

    def names(self) -> list[str]:
        """Parameters that have a mask."""
        wrong = [name for name in self._sizes if not name.endswith(SUFFIX)]
        if wrong:
            raise FormatError(
                f"{self.path.name}: {wrong[0]!r} does not end in {SUFFIX}; is it a MaskLLM file?"
            )
        return [name.removesuffix(SUFFIX) for name in self._sizes]

    def mask(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The mask of one parameter, its declared size checked before it is unpacked.

        Raises:
            FormatError: it does not fit the weight, or is not a plain array.
        """
        key = name + SUFFIX
        expected = -(-int(np.prod(shape, dtype=np.int64)) // 8)
        if self._sizes[key] > expected + _HEADER_BYTES:
            raise FormatError(
                f"{self.path.name}: {key!r} unpacks to {self._sizes[key]} bytes, its weight needs {expected}"
            )
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                bits = archive[key]
            if not isinstance(bits, np.ndarray):
                raise ValueError("it is not a numpy array")
        except (ValueError, zipfile.BadZipFile, OSError) as error:
            raise FormatError(f"{self.path.name}: {key!r} cannot be read: {error}") from error
        try:
            return unpack_flat(bits, shape)
        except FormatError as error:
            raise FormatError(f"{self.path.name}: {key!r}: {error}") from error


class MaskLLMReader(DenseReader):
    """Canonical tensors of a dense checkpoint times its masks."""

    format = "maskllm"

    def __init__(self, checkpoint: Checkpoint, trust_claims: bool = True) -> None:
        super().__init__(checkpoint, trust_claims)
        path = checkpoint.path / FILE
        if not path.is_file():
            raise FormatError(
                f"{checkpoint.path} has no {FILE}; put MaskLLM's mask file next to the base model's weights"
            )
        self._masks = MaskFile(path)

    def entries(self) -> Sequence[Entry]:
        """See :class:`~converters.readers.base.Reader`."""
        masked = set(self._masks.names())
        entries = super().entries()
        unknown = masked - {entry.name for entry in entries}
        if unknown:
            raise FormatError(
                f"{FILE} masks {sorted(unknown)[0]!r}, which the model does not have; it belongs to another "
                "model"
            )
        return [
            replace(entry, stored=self.format, claims_24=True) if entry.name in masked else entry
            for entry in entries
        ]

    def load(self, entry: Entry) -> Loaded:
        """See :class:`~converters.readers.base.Reader`."""
        loaded = super().load(entry)
        if entry.stored == self.format:
            mask = self._masks.mask(entry.name, tuple(loaded.weight.shape))
            loaded.weight = torch.where(mask, loaded.weight, torch.zeros((), dtype=loaded.weight.dtype))
        return loaded
