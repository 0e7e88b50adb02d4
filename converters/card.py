"""The model card (README.md) of a converted checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.report import Report

# Written next to a model by `vllm-sparse eval --json` and by `vllm-sparse compress`.
EVAL_FILE = "eval.json"
COMPRESSION_FILE = "compression.json"


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _method_line(found: Mapping[str, Any]) -> str:
    method = found.get("method")
    if not isinstance(method, str):
        return "The pruning method is not recorded in the source checkpoint."
    return f"Pruned with `{method[:80]}`."


def _evaluation(source: Path) -> list[str]:
    """Perplexities that were measured on the source and on the model it was made from."""
    compression = _read_json(source, COMPRESSION_FILE)
    rows = [
        ("before compression", compression.get("dense")),
        ("compressed", compression.get("compressed")),
        ("compressed", _read_json(source, EVAL_FILE)),
    ]
    lines = []
    for name, found in rows:
        perplexity = found.get("perplexity") if isinstance(found, dict) else None
        if isinstance(found, dict) and isinstance(perplexity, int | float):
            lines.append(f"| {name} | {perplexity:.4f} | {found.get('context_length')} |")
    if not lines:
        return ["Not evaluated yet: `vllm-sparse eval <this folder> --data <text file>` measures perplexity."]
    note = "Measured before conversion, which keeps the weights unless the table above says otherwise."
    return ["| model | perplexity | context length |", "|---|---|---|", *lines, "", note]


def model_card(report: Report, source: Path, command: str) -> str:
    """Markdown with the Hub's front matter.

    Args:
        report: what the conversion did.
        source: the source folder, for the pruning method and evaluation recorded there.
        command: the command line that made the checkpoint.
    """
    name = source.name
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
        f"Converted from `{name}` ({report.source_format}) by vllm-sparse.",
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
        f"| tensors before | {_bytes(report.source_bytes)} |",
        f"| tensors after | {_bytes(report.destination_bytes)} ({ratio:.3f} of before) |",
    ]
    if report.dense:
        reasons = ", ".join(f"{count} × {why}" for why, count in sorted(report.dense_reasons().items()))
        lines += ["", f"Linears left dense: {reasons}. Each is named in `ignore` in config.json."]
    lines += ["", "## Evaluation", "", *_evaluation(source)]
    lines += ["", "## Use", "", "```", "pip install vllm-sparse", "vllm serve <this folder>", "```"]
    lines += ["", "## Made with", "", "```", command, "```", ""]
    return "\n".join(lines)
