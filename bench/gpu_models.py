"""Two checkpoints of one shape with the same random 2:4 weights, to time dense and sparse serving.

``python -m bench.gpu_models OUT [--shape llama-3.1-8b] [--device cuda]`` writes ``OUT/dense``, a plain bf16
Llama whose linears hold two non-zeros in every four, and ``OUT/sparse``, the same weights as
``vllm-sparse convert OUT/dense`` stores them (``sparse-24-bitmask``). Speed does not depend on the values,
so they are drawn, a layer at a time, on the device; the models answer nothing.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.files import line_writer
from bench.rivals.checkpoints import SHAPES, Shape, write_tokenizer
from converters.config_json import Compression
from converters.layers import Kind, kind_of
from converters.plan import Plan, ShardPlan, make_plan
from converters.readers.base import Entry, Loaded
from converters.safetensors_io import ShardWriter
from converters.sizes import size
from converters.staging import check_free
from converters.writers.base import Decision, Writer
from converters.writers.dense import DenseWriter
from converters.writers.sparse24 import Sparse24Writer
from vllm_sparse.errors import UserError

SEED = 0
_STD, _EMBEDDING_STD, _HEAD_STD = 0.02, 0.5, 0.05
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
# Written at a time; each waits for the disk, copies from the device or hashes.
_WRITERS = 8
# Room for config and tokenizer beside the weights.
_SIDE_BYTES = 64 << 20

MODELS = {
    **SHAPES,
    "llama-3.1-8b": Shape("llama-3.1-8b", 4096, 14336, 32, 32, 8, 128256, tied=False),
}


@dataclass(frozen=True)
class Half:
    """One of the two checkpoints: what writes it, and what goes where."""

    folder: Path
    writer: Writer
    plan: Plan


def draw_24(rows: int, cols: int, std: float, generator: torch.Generator) -> Tensor:
    """Normal bf16 weights ``[rows, cols]``, exactly 2 of every 4 non-zero, on the generator's device."""
    device = generator.device
    values = torch.empty(rows, cols // 2, dtype=torch.bfloat16, device=device)
    values.normal_(0, std, generator=generator)
    values.masked_fill_(values == 0, std)
    patterns = torch.randint(0, len(_PAIRS), (rows, cols // 4), device=device, generator=generator)
    dense = torch.zeros(rows, cols // 4, 4, dtype=torch.bfloat16, device=device)
    dense.scatter_(2, torch.tensor(_PAIRS, device=device)[patterns], values.view(rows, cols // 4, 2))
    return dense.view(rows, cols)


def entries(shape: Shape) -> list[Entry]:
    """The tensors of a model, each with the shard it goes to: one of the ends, one for each layer."""

    def entry(name: str, *sizes: int) -> Entry:
        parts = name.split(".")
        shard = f"layer {parts[2]}" if parts[1] == "layers" else parts[1] if parts[0] == "model" else parts[0]
        return Entry(name, sizes, torch.bfloat16, kind_of(name, len(sizes)), (name,), shard)

    found = [entry("model.embed_tokens.weight", shape.vocab, shape.hidden)]
    if not shape.tied:
        found.append(entry("lm_head.weight", shape.vocab, shape.hidden))
    for index in range(shape.layers):
        prefix = f"model.layers.{index}"
        found += [entry(f"{prefix}.{name}.weight", *sizes) for name, sizes in shape.linears().items()]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found.append(entry(f"{prefix}.{name}.weight", shape.hidden))
    return [*found, entry("model.norm.weight", shape.hidden)]


def halves(folder: Path, shape: Shape) -> tuple[Half, Half]:
    """The dense and the sparse checkpoint in ``folder``, planned."""
    config = shape.config()

    def decide(entry: Entry) -> Decision:
        pack = entry.kind is Kind.LINEAR
        return Decision(entry, pack, zeros=entry.numel // 2 if pack else 0)

    decisions = [decide(entry) for entry in entries(shape)]
    writers: dict[str, Writer] = {
        "dense": DenseWriter(config),
        "sparse": Sparse24Writer(Compression(config)),
    }
    dense, sparse = (
        Half(folder / name, writer, make_plan(decisions, writer, config)) for name, writer in writers.items()
    )
    return dense, sparse


def write_models(out: Path, shape: Shape, device: torch.device, say: Callable[[str], None]) -> None:
    """Write both checkpoints; ``out`` appears when they are whole.

    Raises:
        UserError: ``out`` holds something already, or the disk has no room.
    """
    check_free(out)
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=parent) as partial:
        # A folder of its own: the temporary one is for its owner only.
        made = Path(partial) / "models"
        both = halves(made, shape)
        needed = sum(half.plan.nbytes for half in both) + _SIDE_BYTES
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise UserError(
                f"no space left for {out}: it needs {size(needed)}, {size(free)} are free there. "
                "Free some space or choose another disk."
            )
        for half in both:
            half.folder.mkdir(parents=True)
        _write_weights(both, shape, device)
        for half in both:
            _write_sides(half, shape)
            say(f"{out / half.folder.name}: {size(half.plan.nbytes)} of weights")
        made.replace(out)


def _write_weights(both: Sequence[Half], shape: Shape, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(SEED)
    waiting: list[Future[None]] = []
    with ThreadPoolExecutor(_WRITERS) as workers:
        # The same entries in the same order on both sides.
        for shards in zip(*(half.plan.shards for half in both), strict=True):
            drawn = {item.entry.name: _draw(item.entry, shape, generator) for item in shards[0].decisions}
            for half, shard in zip(both, shards, strict=True):
                waiting.append(workers.submit(_write_shard, half, shard, _encoded(half, shard, drawn)))
            # What waits to be written is held in the device's memory.
            while len(waiting) > 2 * _WRITERS:
                waiting.pop(0).result()
        for future in waiting:
            future.result()


def _draw(entry: Entry, shape: Shape, generator: torch.Generator) -> Tensor:
    if len(entry.shape) == 1:
        return torch.ones(entry.shape, dtype=torch.bfloat16, device=generator.device)
    if entry.kind is not Kind.LINEAR:
        std = _HEAD_STD if entry.kind is Kind.HEAD or shape.tied else _EMBEDDING_STD
        matrix = torch.empty(entry.shape, dtype=torch.bfloat16, device=generator.device)
        return matrix.normal_(0, std, generator=generator)
    # What is added to the residual stream by all layers together stays of the embedding's size.
    added = entry.module.endswith(("o_proj", "down_proj"))
    rows, cols = entry.shape
    return draw_24(rows, cols, _STD / (2 * shape.layers) ** 0.5 if added else _STD, generator)


def _encoded(half: Half, shard: ShardPlan, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for decision in shard.decisions:
        found |= half.writer.encode(decision, Loaded(drawn[decision.entry.name]))
    return found


def _write_shard(half: Half, shard: ShardPlan, tensors: Mapping[str, Tensor]) -> None:
    out = ShardWriter(half.folder / shard.name, shard.specs, {"format": "pt"})
    try:
        for name, tensor in tensors.items():
            out.put(name, tensor.cpu())
        out.close()
    finally:
        out.abort()


def _write_sides(half: Half, shape: Shape) -> None:
    write_tokenizer(half.folder, shape.vocab)
    documents: dict[str, Mapping[str, Any]] = {
        "config.json": half.plan.config,
        "model.safetensors.index.json": half.plan.index(),
    }
    for name, document in documents.items():
        (half.folder / name).write_text(json.dumps(document, indent=2) + "\n")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no NVIDIA GPU that torch can use; --device cpu is slower")
    return device


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make, with dense and sparse in it")
    parser.add_argument("--shape", choices=list(MODELS), default="llama-3.1-8b", help="default: llama-3.1-8b")
    parser.add_argument("--device", default="cuda", help="where weights are drawn, default: cuda")
    chosen = parser.parse_args(arguments)
    try:
        write_models(chosen.out, MODELS[chosen.shape], _device(chosen.device), line_writer(sys.stdout))
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return UserError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
