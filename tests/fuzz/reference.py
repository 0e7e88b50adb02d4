"""A second, independent reading of a checkpoint, for comparison: the safetensors library and plain numpy.

It shares no code with ``converters`` and follows docs/format.md and docs/convert.md. :class:`Refused` is its
answer to bytes that no reading can be right for.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

QUANTIZED = (torch.int8, torch.float8_e4m3fn)


class Refused(Exception):
    """The bytes do not describe a checkpoint of the format."""


def raw_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the shards, as the library reads them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            with safe_open(folder / name, "pt") as shard:
                for key in shard.keys():  # noqa: SIM118 - not a dict
                    if key in tensors:
                        raise Refused(f"{key} is stored twice")
                    tensors[key] = shard.get_tensor(key)
        except Exception as error:
            raise Refused(str(error)) from error
    return tensors


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy() if tensor.dtype != torch.bool else tensor.numpy().astype(float)


def _scaled(weight: np.ndarray, scale: torch.Tensor | None) -> np.ndarray:
    if scale is None:
        return weight
    factor = _numbers(scale).reshape(-1)
    if factor.size not in (1, weight.shape[0]):
        factor = factor.reshape(weight.shape[0], -1)
        factor = np.repeat(factor, weight.shape[1] // factor.shape[1], axis=1)
    elif factor.size > 1:
        factor = factor[:, None]
    return weight * factor


def _spread(values: np.ndarray, bitmask: torch.Tensor, rows: int, cols: int, two_four: bool) -> np.ndarray:
    if tuple(bitmask.shape) != (rows, -(-cols // 8)):
        raise Refused(f"bitmask {list(bitmask.shape)} for [{rows}, {cols}]")
    mask = np.unpackbits(bitmask.numpy(), axis=-1, bitorder="little")
    if mask[:, cols:].any():
        raise Refused("pad bits")
    mask = mask[:, :cols].astype(bool)
    if two_four and (cols % 4 or (mask.reshape(rows, -1, 4).sum(-1) != 2).any()):
        raise Refused("not two bits in each group")
    if mask.sum() != values.size:
        raise Refused("as many values as bits")
    dense = np.zeros((rows, cols))
    dense[mask] = values.reshape(-1)
    return dense


def _module(tensors: dict[str, torch.Tensor], module: str, config: dict) -> np.ndarray:
    """A module of ``sparse-24-bitmask`` or ``sparse24``."""
    compressed = tensors[f"{module}.compressed"]
    linear = config.get("quantization_config", {}).get("linear") or {}
    if linear.get("weights") == "int4":
        nibbles = np.stack([compressed.numpy() & 15, compressed.numpy() >> 4], axis=-1).astype(np.int64)
        values = ((nibbles ^ 8) - 8).reshape(compressed.shape[0], -1).astype(float)
    else:
        values = _numbers(compressed)
    rows, cols = values.shape[0], 2 * values.shape[1]
    if tensors[f"{module}.shape"].reshape(-1).tolist() != [rows, cols]:
        raise Refused("shape disagrees")
    weight = _spread(values, tensors[f"{module}.bitmask"], rows, cols, two_four=True)
    quantized = compressed.dtype in QUANTIZED or linear.get("weights") == "int4"
    weight = _scaled(weight, tensors[f"{module}.weight_scale"] if quantized else None)
    if linear.get("low_rank"):
        weight = weight + _numbers(tensors[f"{module}.low_rank_b"]) @ _numbers(
            tensors[f"{module}.low_rank_a"]
        )
    if linear.get("outliers"):
        weight = weight + _csr(tensors, module, weight.shape)
    return weight


def _csr(tensors: dict[str, torch.Tensor], module: str, shape: tuple[int, ...]) -> np.ndarray:
    values = _numbers(tensors[f"{module}.outlier_values"])
    columns = tensors[f"{module}.outlier_columns"].tolist()
    offsets = tensors[f"{module}.outlier_row_offsets"].tolist()
    if offsets[0] != 0 or offsets[-1] != len(values) or not len(values) == len(columns):
        raise Refused("row offsets")
    dense = np.zeros(shape)
    for row, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if end < begin or sorted(set(columns[begin:end])) != columns[begin:end]:
            raise Refused("order")
        for place in range(begin, end):
            if columns[place] < 0:
                raise Refused("negative column")
            dense[row, columns[place]] = values[place]
    return dense


def read(folder: Path, form: str) -> dict[str, np.ndarray]:
    """``{name: numbers}`` of every weight, float64.

    Args:
        folder: of the checkpoint.
        form: the format that it is to be read as.

    Raises:
        Refused: it cannot be that.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = raw_tensors(folder)
    found: dict[str, np.ndarray] = {}
    try:
        for name in tensors:
            if name.endswith(".weight.compressed") and form == "sparse-bitmask":
                prefix = name.removesuffix(".compressed")
                rows, cols = tensors[f"{prefix}.shape"].reshape(-1).tolist()
                values = _numbers(tensors[name])
                found[prefix] = _spread(values, tensors[f"{prefix}.bitmask"], rows, cols, two_four=False)
            elif name.endswith(".compressed") and form in ("sparse-24-bitmask", "sparse24"):
                module = name.removesuffix(".compressed")
                found[f"{module}.weight"] = _module(tensors, module, config)
            elif name.endswith(".weight"):
                module = name.removesuffix(".weight")
                scale = tensors.get(f"{module}.weight_scale") if tensors[name].dtype in QUANTIZED else None
                found[name] = _scaled(_numbers(tensors[name]), scale)
    except (KeyError, ValueError, IndexError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    if form == "maskllm":
        with np.load(folder / "mask_compressed.npz") as masks:
            for key in masks.files:
                name = key.removesuffix(".mask")
                bits = np.unpackbits(masks[key], bitorder="big")[: found[name].size]
                found[name] = np.where(bits.reshape(found[name].shape).astype(bool), found[name], 0.0)
    return found
