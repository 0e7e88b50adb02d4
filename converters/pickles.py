"""Opt-in reading of pickled weights and models: a sandboxed process turns each file into safetensors."""

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint import PICKLE_SUFFIXES, Checkpoint, is_inside, load_config
from converters.config_json import load_json
from converters.pickle_worker import MODEL_CONFIG
from converters.safetensors_io import TensorInfo, iter_files, read_header
from vllm_sparse.errors import FormatError, UserError
from vllm_sparse.models.families import FAMILIES

logger = logging.getLogger(__name__)

WALL_SECONDS = 2 * 3600
# torch itself maps some gigabytes of libraries; the weights come on top.
_BASE_MEMORY = 16 << 30
_INDEX = "pytorch_model.bin.index.json"
# transformers.models.llama.configuration_llama.LlamaConfig says "llama", which the object itself does not.
_CONFIG_CLASS = re.compile(r"transformers\.models\.(\w+)\.configuration_\1\.\w+")


@dataclass(frozen=True)
class Unpickled:
    """One pickled file's tensors as safetensors, and the plain values that stood beside them."""

    path: Path
    facts: dict[str, Any]


def pickled_files(source: Path) -> list[Path]:
    """The pickled weight files of a folder, or the file itself.

    Raises:
        FormatError: none there, or a link out of the folder.
    """
    if source.is_file():
        if source.suffix not in PICKLE_SUFFIXES:
            raise FormatError(f"{source} is not one of {', '.join(PICKLE_SUFFIXES)}")
        return [source]
    index = source / _INDEX
    if index.is_file():
        weight_map = load_json(index).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
        if not names or any(
            "/" in name or "\\" in name or not name.endswith(PICKLE_SUFFIXES) for name in names
        ):
            raise FormatError(f"{index.name}: weight_map must map tensors to plain file names")
        found = [source / name for name in names]
    else:
        skip = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
        found = [
            path
            for path in iter_files(source, "")
            if path.suffix in PICKLE_SUFFIXES and not path.name.startswith(skip)
        ]
    if not found:
        raise FormatError(f"{source} holds no pickled weights ({', '.join(PICKLE_SUFFIXES)})")
    for path in found:
        if not path.is_file() or not is_inside(path, source):
            raise FormatError(f"{path.name} is missing in {source}, or a link that leaves it")
    return found


def has_only_pickles(source: Path) -> bool:
    """Whether the source is a pickled file, or a folder whose weights are all pickled."""
    if source.is_file():
        return source.suffix in PICKLE_SUFFIXES
    if not source.is_dir() or next(iter_files(source, ".safetensors"), None) is not None:
        return False
    return any(path.suffix in PICKLE_SUFFIXES for path in iter_files(source, ""))


def unpickle(path: Path, work: Path) -> Unpickled:
    """Open one pickle in a sandboxed process, as tensors and data.

    Args:
        path: the pickled file; only read.
        work: an empty folder for the result.

    Raises:
        FormatError: it holds neither tensors beside plain values nor a model object.
        UserError: the process ran out of time or was killed.
    """
    command = [sys.executable, "-m", "converters.pickle_worker", str(path.resolve()), str(work.resolve())]
    memory = _BASE_MEMORY + 4 * path.stat().st_size
    # No credentials, proxies or options reach the process.
    environment = {
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(work),
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [*command, str(memory)],
            env=environment,
            cwd=work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{path.name} took over {WALL_SECONDS} s to open; given up") from error
    said = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
    if done.returncode == 3:
        raise FormatError(
            f"{path.name} cannot be opened as tensors alone, nor as a model made of them ({said}). Files "
            "that need code to open are not read; save the state dict, or better safetensors, with the tool "
            "that made it."
        )
    if done.returncode:
        raise UserError(f"the process that opened {path.name} ended with code {done.returncode} ({said})")
    result = load_json(work / "facts.json")
    for missing in result.get("sandbox_missing") or ():
        logger.warning("sandbox for %s without %s", path.name, missing)
    facts = result.get("facts")
    return Unpickled(work / "tensors.safetensors", facts if isinstance(facts, dict) else {})


def pickled_config(facts: dict[str, Any]) -> dict[str, Any]:
    """config.json of a model that was pickled whole, from its configuration object; empty without one.

    Raises:
        FormatError: the object's class is none of the served families'.
    """
    found = facts.get(MODEL_CONFIG)
    if not isinstance(found, dict):
        return {}
    name, values = found.get("class"), found.get("values")
    match = _CONFIG_CLASS.fullmatch(name) if isinstance(name, str) else None
    family = FAMILIES.get(match[1]) if match else None
    if family is None or not isinstance(values, dict):
        raise FormatError(
            f"the pickled model has the configuration {name or 'of no class'!r}, which is none of "
            f"{', '.join(FAMILIES)}; put its config.json next to the file"
        )
    config = {key: value for key, value in values.items() if not key.startswith("_")}
    return config | {"model_type": family.model_type, "architectures": [family.stock_architecture]}


@contextlib.contextmanager
def opened_pickles(source: Path, near: Path) -> Iterator[tuple[Checkpoint, dict[str, Any]]]:
    """A checkpoint made of pickles, on disk while the block runs, and the plain values beside the weights.

    Args:
        source: a folder or one file.
        near: the folder in which temporary files are made, or the first above it that exists; it needs room
            for the weights.

    Raises:
        FormatError: as :func:`unpickle`, and tensors that are in two files.
    """
    folder = source if source.is_dir() else source.parent
    while not near.exists():
        near = near.parent
    work = Path(tempfile.mkdtemp(prefix=".vllm-sparse-unpickled-", dir=near))
    try:
        tensors: dict[str, TensorInfo] = {}
        facts: dict[str, Any] = {}
        shards = []
        for position, path in enumerate(pickled_files(source), 1):
            own = work / f"{position:05d}"
            own.mkdir()
            opened = unpickle(path, own)
            shard = work / f"model-{position:05d}.safetensors"
            os.replace(opened.path, shard)
            shards.append(shard.name)
            facts |= opened.facts
            infos, _ = read_header(shard)
            twice = set(infos) & set(tensors)
            if twice:
                raise FormatError(f"tensor {sorted(twice)[0]!r} is in two pickled files")
            tensors |= infos
        if MODEL_CONFIG in facts:
            logger.warning("model object read as data; its tokenizer object is not: put its files next to it")
        config = load_config(folder) if (folder / "config.json").is_file() else pickled_config(facts)
        originals = tuple(path.name for path in pickled_files(source))
        yield Checkpoint(folder, config, tuple(shards), tensors, {}, originals), facts
    finally:
        shutil.rmtree(work, ignore_errors=True)
