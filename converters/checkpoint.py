"""Access to a checkpoint folder: config.json, safetensors shards, side files. Opens nothing it should not."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.config_json import load_json
from converters.safetensors_io import TensorInfo, iter_files, read_header, read_tensor
from vllm_sparse.errors import FormatError, UnsupportedError, UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}\Z")
# Fetched from the hub: weights in safetensors and everything small; never pickles or code.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", "*.npz"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors shards whose headers have been checked.

    Attributes:
        path: the folder.
        config: config.json, plain JSON.
        shards: shard file names in order.
        tensors: every tensor's place, in shard order, then file order.
        metadata: the shards' own ``__metadata__``, by shard.
        originals: the weight files in ``path`` when they are not the shards themselves (unpickled ones).
    """

    path: Path
    config: Mapping[str, Any]
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Mapping[str, str]]
    originals: tuple[str, ...] = ()

    def read(self, name: str) -> Tensor:
        """One tensor, mapped privately from its shard.

        Raises:
            FormatError: there is no such tensor.
        """
        if name not in self.tensors:
            raise FormatError(f"{self.path}: tensor {name!r} is missing")
        return read_tensor(self.tensors[name])

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def side_files(self) -> Iterator[Path]:
        """Tokenizer, generation and other small files that a converted checkpoint carries over."""
        for path in iter_files(self.path, ""):
            name = path.name
            if name.startswith(".") or name == "config.json" or name.endswith(".index.json"):
                continue
            if path.suffix in (".safetensors", *PICKLE_SUFFIXES, ".npz", ".gguf", ".py", ".h5", ".msgpack"):
                continue
            if not is_inside(path, self.path):
                raise FormatError(f"{name} is a link that leaves {self.path}; refused")
            yield path


def resolve(source: str | Path) -> Path:
    """A local folder for ``source``: the folder itself, or a hub id fetched into the hub's cache.

    Raises:
        UserError: no such folder, and not a hub id that can be fetched.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.suffix in PICKLE_SUFFIXES and path.is_file():
        raise UnsupportedError(
            f"{path} is a pickle, which can run code when opened. Use a safetensors version, or "
            "`vllm-sparse convert --allow-pickle`, which opens it weights-only in a sandbox."
        )
    if path.exists():
        raise FormatError(f"{path} is a file; give the checkpoint's folder (config.json and *.safetensors)")
    if path.is_absolute() or not _HUB_ID.match(str(source)) or str(source).startswith("."):
        raise FormatError(f"no such folder: {path}. Give a checkpoint folder or a hub id such as org/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source} is neither a folder here nor a model that could be fetched from the hub ({first}). "
            "Check the name, the network and HF_HUB_OFFLINE, or download it first."
        ) from error


def is_inside(path: Path, folder: Path) -> bool:
    """Whether ``path``, links resolved, lies in ``folder`` or in the blobs of the hub cache it belongs to."""
    real = path.resolve()
    root = folder.resolve()
    if real.is_relative_to(root):
        return True
    snapshots = root.parent
    return snapshots.name == "snapshots" and real.is_relative_to(snapshots.parent / "blobs")


def _shard_path(folder: Path, name: Any) -> Path:
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise FormatError(f"{INDEX}: shard name {name!r} is not a plain file name; refused")
    if not name.endswith(".safetensors"):
        if name.endswith(PICKLE_SUFFIXES):
            raise UnsupportedError(f"{INDEX}: shard {name!r} is a pickle; only safetensors are read here")
        raise FormatError(f"{INDEX}: shard {name!r} is not a .safetensors file")
    path = folder / name
    if not path.is_file():
        raise FormatError(f"{INDEX} names shard {name!r}, which is not in {folder}")
    if not is_inside(path, folder):
        raise FormatError(f"shard {name!r} is a link that leaves {folder}; refused")
    return path


def _shard_list(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    index = folder / INDEX
    if index.is_file():
        weight_map = load_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{INDEX}: weight_map must be an object that maps tensor names to shards")
        names = sorted({str(shard) for shard in weight_map.values()})
        return [_shard_path(folder, name) for name in names], weight_map
    if (folder / SINGLE).is_file():
        return [_shard_path(folder, SINGLE)], None
    paths = [_shard_path(folder, path.name) for path in iter_files(folder, ".safetensors")]
    if not paths:
        pickles = [path.name for path in iter_files(folder, "") if path.suffix in PICKLE_SUFFIXES]
        if pickles:
            raise UnsupportedError(
                f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when "
                "opened. Use a safetensors version, or `vllm-sparse convert --allow-pickle`, which opens "
                "them weights-only in a sandbox."
            )
        raise FormatError(f"{folder} holds no *.safetensors weights; is it the right folder?")
    _check_numbers(paths)
    return paths, None


def _check_numbers(paths: Sequence[Path]) -> None:
    """Without an index, only the names can say that a shard is missing."""
    found = [match for path in paths if (match := _NUMBERED.fullmatch(path.name))]
    for stem, total in dict.fromkeys((match[1], match[3]) for match in found):
        there = {int(match[2]) for match in found if (match[1], match[3]) == (stem, total)}
        gone = next((number for number in range(1, int(total) + 1) if number not in there), None)
        # Some tools count from 0.
        if gone is not None and 0 not in there:
            raise FormatError(
                f"{paths[0].parent} has no {stem}-{gone:05d}-of-{total}.safetensors and no {INDEX}; fetch "
                "the rest of the checkpoint"
            )


def _merge_headers(
    paths: list[Path], weight_map: Mapping[str, str] | None
) -> tuple[dict[str, TensorInfo], dict[str, Mapping[str, str]]]:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    for path in paths:
        infos, metadata[path.name] = read_header(path)
        for name, info in infos.items():
            if name in tensors:
                raise FormatError(f"tensor {name!r} is in both {tensors[name].path.name} and {path.name}")
            tensors[name] = info
    if weight_map is not None:
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].path.name != shard:
                raise FormatError(f"{INDEX} says tensor {name!r} is in {shard}, but it is not there")
        extra = [name for name in tensors if name not in weight_map]
        if extra:
            raise FormatError(
                f"{len(extra)} tensors in the shards are not in {INDEX} (first: {extra[0]!r}); "
                "the index belongs to other shards"
            )
    return tensors, metadata


def load_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        FormatError: missing, not JSON, or a link out of the folder.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FormatError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    if not is_inside(path, folder):
        raise FormatError(f"config.json is a link that leaves {folder}; refused")
    return load_json(path)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint: every header is read and checked, no weight is.

    Raises:
        FormatError: missing or malformed config, index, shard or header.
        UnsupportedError: the weights are pickles.
    """
    folder = resolve(source)
    config = load_config(folder)
    paths, weight_map = _shard_list(folder)
    tensors, metadata = _merge_headers(paths, weight_map)
    if not tensors:
        raise FormatError(f"{folder}: the safetensors files hold no tensors")
    return Checkpoint(folder, config, tuple(path.name for path in paths), tensors, metadata)
