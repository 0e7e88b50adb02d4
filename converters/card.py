"""The model card (README.md) of a converted checkpoint, and what is measured on it later."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.manifest import NAME as MANIFEST
from converters.manifest import file_sha256
from converters.report import Report
from converters.sizes import size
from converters.staging import write_file
from vllm_sparse.errors import FormatError

# Written next to a model by `vllm-sparse eval --save` and by `vllm-sparse compress`.
EVAL_FILE = "eval.json"
COMPRESSION_FILE = "compression.json"


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _method_line(found: Mapping[str, Any]) -> str:
    method = found.get("method")
    if not isinstance(method, str):
        return "The pruning method is not recorded in the source checkpoint."
    return f"Pruned with `{method[:80]}`."


def _evaluation(folder: Path, converted: bool = False) -> list[str]:
    """Perplexities that were measured on the source and on the model it was made from.

    Args:
        folder: the source, or with ``converted`` the result, whose own evaluation counts then.
        converted: see above.
    """
    compression = _read_json(folder, COMPRESSION_FILE)
    rows = [
        ("before compression", compression.get("dense")),
        ("compressed", compression.get("compressed")),
        ("this checkpoint" if converted else "compressed", _read_json(folder, EVAL_FILE)),
    ]
    lines = []
    for name, found in rows:
        perplexity = found.get("perplexity") if isinstance(found, dict) else None
        if isinstance(found, dict) and isinstance(perplexity, int | float):
            lines.append(f"| {name} | {perplexity:.4f} | {found.get('context_length')} |")
    if not lines:
        return ["Not evaluated yet: `vllm-sparse eval <this folder> --data <text file>` measures perplexity."]
    note = "Measured before conversion, which keeps the weights unless the table above says otherwise."
    if converted:
        note = f"`this checkpoint` was measured as it is stored here; {EVAL_FILE} has the figures."
    return ["| model | perplexity | context length |", "|---|---|---|", *lines, "", note]


def record_evaluation(folder: Path, figures: Mapping[str, Any]) -> tuple[str, ...]:
    """Keep an evaluation with the checkpoint it was made of.

    ``eval.json`` is written; where `vllm-sparse convert` made the folder, its model card's table and its
    manifest follow.

    Args:
        folder: the evaluated checkpoint.
        figures: the ``vllm-sparse/eval/1`` object.

    Returns:
        The names of the files that were written.

    Raises:
        FormatError: not a folder, or a manifest that is none.
    """
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder} is no checkpoint folder here, so nothing can be kept with it")
    manifest = _read_json(folder, MANIFEST)
    files = manifest.get("files")
    if manifest and not isinstance(files, dict):
        raise FormatError(f"{folder / MANIFEST} is not a manifest: it has no files")
    write_file(folder / EVAL_FILE, (json.dumps(dict(figures), indent=2) + "\n").encode())
    if not isinstance(files, dict):
        return (EVAL_FILE,)
    card = folder / "README.md"
    section = "\n".join(["## Evaluation", "", *_evaluation(folder, converted=True), "", ""])
    text = re.sub(
        r"^## Evaluation\n.*?(?=^## )", lambda _: section, card.read_text("utf-8"), flags=re.M | re.S
    )
    write_file(card, text.encode())
    for path in (folder / EVAL_FILE, card):
        files[path.name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    manifest["files"] = dict(sorted(files.items()))
    write_file(folder / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
    return (EVAL_FILE, card.name, MANIFEST)


def _source_name(report: Report, source: Path) -> tuple[str, str]:
    """What to call the source, and how to cite it: a hub id has its revision, not the cache's folder."""
    if source.parent.name == "snapshots" and not Path(report.source).is_dir():
        return report.source, f"`{report.source}`, revision `{source.name}`"
    name = source.resolve().name
    return name, f"`{name}`"


def model_card(report: Report, source: Path, command: str) -> str:
    """Markdown with the Hub's front matter.

    Args:
        report: what the conversion did.
        source: the source folder, for the pruning method and evaluation recorded there.
        command: the command line that made the checkpoint.
    """
    name, cited = _source_name(report, source)
    total = report.packed + len(report.dense)
    ratio = report.destination_bytes / report.source_bytes if report.source_bytes else 1.0
    lines = [
        "---",
        "library_name: vllm",
        "tags:",
        "- vllm-sparse",
        *(["- 2:4-sparse"] if report.packed else []),
        "---",
        f"# {name}, {'2:4 packed' if report.packed else report.target}",
        "",
        f"Converted from {cited} ({report.source_format}) by vllm-sparse.",
        "",
        "## Compression",
        "",
        _method_line(_read_json(source, COMPRESSION_FILE)),
        "",
        "| | |",
        "|---|---|",
        f"| format | {report.target} |",
        f"| packed weights | {'as in the source' if report.weights == 'keep' else report.weights} |",
        f"| linears packed as 2:4 | {report.packed} of {total} |",
        f"| zeros in linear weights | {100 * report.sparsity:.2f} % |",
        f"| tensors before | {size(report.source_bytes)} |",
        f"| tensors after | {size(report.destination_bytes)} ({ratio:.3f} of before) |",
    ]
    if report.dense:
        reasons = ", ".join(f"{count} × {why}" for why, count in sorted(report.dense_reasons().items()))
        lines += ["", f"Linears left dense: {reasons}. Each is named in `ignore` in config.json."]
    lines += ["", "## Evaluation", "", *_evaluation(source)]
    lines += ["", "## Use", "", "```", "pip install vllm-sparse", "vllm serve <this folder>", "```"]
    lines += ["", "## Made with", "", "```", command, "```", ""]
    return "\n".join(lines)
