"""The demo's models: one trained (or given), compressed to 2:4 and structurally, each with a dense twin.

A twin answers the same questions with plain dense weights, so that what the plugin serves can be checked
against stock vLLM.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.demo.steps import Steps
from converters.checkpoint import open_checkpoint
from converters.convert import convert
from converters.train.compress import SUMMARY as COMPRESSION_SUMMARY
from converters.train.compress import compress_model
from converters.train.corpus import load_corpus
from converters.train.evaluate import evaluate_directory, windows
from converters.train.packing import encode_documents
from converters.train.recipes import PRESETS
from converters.train.trainer import SUMMARY as TRAINING_SUMMARY
from converters.train.trainer import run_directory, train_model
from vllm_sparse.errors import FormatError

DATA = "stdlib"
# Kept share of FFN channels: less in the middle, so that layers differ in shape.
OUTER_KEEP_RATIO, INNER_KEEP_RATIO = 0.75, 0.5
# The same held-out tokens for every perplexity, by the trainer and through the API.
EVAL_CONTEXT, EVAL_TOKENS = 512, 32_768


@dataclass(frozen=True)
class DemoModel:
    """One served model.

    Attributes:
        name: for tables.
        kind: ``dense``, ``2:4`` or ``structured``.
        directory: what is served.
        twin: dense checkpoint with the same answers; None for the dense model itself.
        perplexity: held-out, by the trainer, on the saved weights in float32.
        detail: how it was made, in a few words.
    """

    name: str
    kind: str
    directory: Path
    twin: Path | None
    perplexity: float
    detail: str


@dataclass(frozen=True)
class DemoModels:
    """All models of the demo, the dense one first."""

    models: tuple[DemoModel, ...]
    perplexity_unigram: float | None

    @property
    def dense(self) -> DemoModel:
        """The uncompressed model."""
        return self.models[0]


def build(out: Path, model: str | None, preset: str, steps: Steps) -> DemoModels:
    """Train or take the model, compress it twice, convert.

    Args:
        out: working directory; finished parts of an earlier run are reused.
        model: model directory or hub id; None trains the demo's own.
        preset: training recipe, a key of :data:`converters.train.recipes.PRESETS`.
        steps: progress display.
    """
    dense, unigram = _given(model, steps) if model else _trained(out / "dense", preset, steps)
    return DemoModels((dense, _two_four(dense, out, steps), _structured(dense, out, steps)), unigram)


def _trained(directory: Path, preset: str, steps: Steps) -> tuple[DemoModel, float]:
    recipe = PRESETS[preset].model_copy(update={"eval_tokens": EVAL_TOKENS})
    summary = directory / TRAINING_SUMMARY
    wanted = recipe.model_dump(mode="json")
    if summary.is_file() and json.loads(summary.read_text())["recipe"] != wanted:
        shutil.rmtree(directory)
        shutil.rmtree(run_directory(directory), ignore_errors=True)
    if not summary.is_file():
        with steps.step("train a small Llama on the standard library's source"):
            train_model(recipe, directory, resume=True, overwrite=True)
    result = json.loads(summary.read_text())
    perplexity = result["evaluation"]["perplexity"]
    detail = f"{result['parameters'] / 1e6:.1f}M parameters, {result['tokens'] / 1e6:.1f}M tokens"
    steps.say(f"dense: {detail}, perplexity {perplexity:.2f} (unigram {result['perplexity_unigram']:.2f})")
    return DemoModel("dense", "dense", directory, None, perplexity, detail), result["perplexity_unigram"]


def _given(model: str, steps: Steps) -> tuple[DemoModel, None]:
    with steps.step(f"find {model}"):
        directory = open_checkpoint(model).path
    with steps.step("measure the model's perplexity"):
        result = evaluate_directory(str(directory), DATA, EVAL_CONTEXT, EVAL_TOKENS)
    return DemoModel("dense", "dense", directory, None, result.perplexity, model), None


def _two_four(dense: DemoModel, out: Path, steps: Steps) -> DemoModel:
    pruned, served = out / "pruned-2of4", out / "2of4"
    with steps.step("prune to 2:4 with SparseGPT"):
        result = compress_model(
            "sparsegpt", dense.directory, pruned, DATA, overwrite=True, eval_tokens=EVAL_TOKENS
        )
    with steps.step("convert to sparse-24-bitmask"):
        shutil.rmtree(served, ignore_errors=True)
        report = convert(pruned, served)
    steps.say(
        f"2:4: {report.packed} linears packed, {report.source_bytes / 1e6:.1f} -> "
        f"{report.destination_bytes / 1e6:.1f} MB on disk"
    )
    return DemoModel("2:4", "2:4", served, pruned, _perplexity(result), "SparseGPT, sparse-24-bitmask")


def _structured(dense: DemoModel, out: Path, steps: Steps) -> DemoModel:
    served, twin = out / "structured", out / "structured-padded"
    layers = json.loads((dense.directory / "config.json").read_text())["num_hidden_layers"]
    ratios = [OUTER_KEEP_RATIO if i in (0, layers - 1) else INNER_KEEP_RATIO for i in range(layers)]
    with steps.step("remove FFN channels by magnitude"):
        result = compress_model(
            "structured-ffn",
            dense.directory,
            served,
            DATA,
            overwrite=True,
            eval_tokens=EVAL_TOKENS,
            keep_ratio=tuple(ratios),
        )
        pad_ffn(served, dense.directory, twin)
    kept = "/".join(str(count) for count in result.figures["ffn_channels"])
    before, after = result.parameters
    steps.say(f"structured: FFN widths {kept}, {before / 1e6:.2f}M -> {after / 1e6:.2f}M parameters")
    return DemoModel("structured", "structured", served, twin, _perplexity(result), f"FFN widths {kept}")


def _perplexity(result: object) -> float:
    compressed = getattr(result, "compressed", None)
    if compressed is None:
        raise FormatError(f"{COMPRESSION_SUMMARY} has no perplexity; eval_tokens must not be 0")
    return float(compressed.perplexity)


def heldout_windows(tokenizer_from: Path) -> list[list[int]]:
    """The held-out tokens that every perplexity here is measured on, in windows of ``EVAL_CONTEXT``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    stream = encode_documents(load_corpus(DATA).heldout, tokenizer, EVAL_TOKENS)
    return [window.tolist() for window in windows(stream, EVAL_CONTEXT)]


def pad_ffn(structured: Path, dense: Path, destination: Path) -> None:
    """The same model in the unpruned shape: removed FFN channels come back as zeros, which add nothing.

    Args:
        structured: checkpoint with ``per_layer_config``.
        dense: the model it was made from, for config and tokenizer.
        destination: plain dense checkpoint to write; replaced if it exists.
    """
    shutil.rmtree(destination, ignore_errors=True)
    shutil.copytree(dense, destination, ignore=shutil.ignore_patterns("*.safetensors*"))
    width = json.loads((dense / "config.json").read_text())["intermediate_size"]
    tensors: dict[str, Tensor] = {}
    for shard in sorted(structured.glob("*.safetensors")):
        tensors |= load_file(shard)
    padded = {name: _pad(name, tensor, width) for name, tensor in tensors.items()}
    save_file(padded, destination / "model.safetensors", metadata={"format": "pt"})


def _pad(name: str, tensor: Tensor, width: int) -> Tensor:
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return torch.nn.functional.pad(tensor, (0, 0, 0, width - tensor.shape[0]))
    if name.endswith("down_proj.weight"):
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
    return tensor
