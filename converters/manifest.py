"""``vllm-sparse-manifest.json``: where a converted checkpoint came from and the hash of each of its files.

It holds no time and no machine name, so that converting the same input twice gives the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.checkpoint import Checkpoint
from converters.readers import MASK_FILE
from converters.report import Report
from converters.safetensors_io import read_header
from vllm_sparse.errors import FormatError

NAME = "vllm-sparse-manifest.json"
SCHEMA = "vllm-sparse/manifest/1"


def source_files(checkpoint: Checkpoint, masks: bool = False) -> dict[str, dict[str, Any]]:
    """Identity of the source's files: size, and the hash of the safetensors header or of a small file.

    Headers, not data: they are what is read before the plan is made, and hashing the data would cost as
    much as the conversion.

    Args:
        checkpoint: the source.
        masks: MaskLLM's masks beside the weights belong to it; they are hashed whole.
    """
    files: dict[str, dict[str, Any]] = {}
    for name in checkpoint.originals:
        files[name] = {"bytes": (checkpoint.path / name).stat().st_size}
    for shard in () if checkpoint.originals else checkpoint.shards:
        path = checkpoint.path / shard
        files[shard] = {"bytes": path.stat().st_size, "header_sha256": _header_hash(path)}
    for name in ("config.json", *((MASK_FILE,) if masks else ())):
        path = checkpoint.path / name
        if path.is_file():
            files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return files


def _header_hash(path: Path) -> str:
    infos, _ = read_header(path)
    first = min(info.offset for info in infos.values()) if infos else path.stat().st_size
    with path.open("rb") as file:
        return hashlib.sha256(file.read(first)).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_manifest(
    report: Report, source: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]], version: str
) -> dict[str, Any]:
    """The manifest of a conversion.

    Args:
        report: what was done.
        source: from :func:`source_files`.
        files: ``{name: {"sha256", "bytes"}}`` of every file written.
        version: of this project.
    """
    return {
        "schema": SCHEMA,
        "producer": f"vllm-sparse {version}",
        "source": {"name": Path(report.source).name, "format": report.source_format, "files": dict(source)},
        "options": {"to": report.target, "weights": report.weights},
        "linears": {
            "packed": report.packed,
            "dense": report.dense,
            "sparsity": round(report.sparsity, 6),
        },
        "bytes": {"source": report.source_bytes, "written": report.destination_bytes},
        "notes": list(report.notes),
        "files": {name: dict(files[name]) for name in sorted(files)},
    }


def check_manifest(folder: Path) -> list[str]:
    """Compare a folder with its manifest.

    Returns:
        One sentence per file that is missing or differs; empty when all is well.

    Raises:
        FormatError: there is no manifest, or it is not one.
    """
    path = folder / NAME
    if not path.is_file():
        raise FormatError(f"{folder} has no {NAME}; it was not written by `vllm-sparse convert`")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["files"]
        expected = {str(name): str(entry["sha256"]) for name, entry in recorded.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is not a manifest: {error}") from error
    problems = []
    for name, digest in expected.items():
        if "/" in name or "\\" in name or name.startswith(".."):
            raise FormatError(f"{path}: {name!r} is not a plain file name")
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file_sha256(file) != digest:
            problems.append(f"{name} differs from what was written")
    return problems
