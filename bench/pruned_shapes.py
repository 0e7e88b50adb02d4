"""A Llama-3.2-1B shape and two structurally pruned ones, random weights, for speed and memory only.

``python -m bench.pruned_shapes out/pruned-shapes`` writes ``dense``, ``pruned-20`` and ``pruned-50``: the
last two lack 20 % and 50 % of the decoder layers' parameters, layer by layer unequally, as depth-aware
pruning leaves them (little from the first and last layers, much from the middle, one attention block
whole). Speed does not depend on the values of the weights; the models answer nothing.

The parameter ratio counts what a decode step reads: every layer, every norm, and the tied output head once
(the embedding's rows that are looked up are the same matrix). Prefill needs the head for one position only,
so its own ratio is that of the layers alone.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from converters.train.structured import LayerShape, base_shape, structured_config
from vllm_sparse.errors import UserError
from vllm_sparse.models.layer_config import FfnShape, read_model_shape

SEED = 0
_STD = 0.02
_MULTIPLE = 64
# How much more the middle layers lose than the average one, and the outer ones less.
_SLOPE = 0.3
#: Share of the layers' parameters that is gone, per model.
MODELS = {"dense": 0.0, "pruned-20": 0.2, "pruned-50": 0.5}

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "use_cache": True,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Size:
    """What a model of some layer shapes costs.

    Attributes:
        layers: parameters of the decoder layers, norms included.
        total: with the tied embedding (once) and the last norm: what a decode step reads.
        kv_token_bytes: bytes of one token's keys and values in bf16.
    """

    layers: int
    total: int
    kv_token_bytes: int

    def kv_tokens(self, cache_bytes: int, block_size: int = 128) -> int:
        """Tokens that fit into a KV cache: whole blocks only."""
        return cache_bytes // (self.kv_token_bytes * block_size) * block_size


def layer_shapes(removed: float) -> list[LayerShape]:
    """Unequal layers that together lack a share ``removed`` of the layers' parameters.

    Raises:
        UserError: the share is not in [0, 0.7].
    """
    if not 0 <= removed <= 0.7:
        raise UserError(f"a share of {removed} cannot be removed here; allowed are 0 to 0.7")
    if removed == 0:
        return [base_shape(CONFIG)] * CONFIG["num_hidden_layers"]
    whole = size_of(layer_shapes(0)).layers
    low, high = 0.0, 1.5
    for _ in range(40):
        middle = (low + high) / 2
        kept = size_of(_shapes(middle, removed)).layers
        low, high = (middle, high) if kept < (1 - removed) * whole else (low, middle)
    return _shapes(high, removed)


def _shapes(level: float, removed: float) -> list[LayerShape]:
    count = CONFIG["num_hidden_layers"]
    group = CONFIG["num_attention_heads"] // CONFIG["num_key_value_heads"]
    shapes = []
    for index in range(count):
        outwards = abs(2 * index / (count - 1) - 1)
        keep = min(1.0, max(0.1, level + _SLOPE * (outwards - 0.5)))
        kv_heads = max(1, round(keep * CONFIG["num_key_value_heads"]))
        width = max(_MULTIPLE, round(keep * CONFIG["intermediate_size"] / _MULTIPLE) * _MULTIPLE)
        # Half of the model gone, and the deepest cut takes a whole attention block.
        if removed >= 0.5 and index == count // 2:
            kv_heads = 0
        shapes.append(LayerShape(kv_heads * group, kv_heads, width))
    return shapes


def model_config(removed: float) -> dict[str, Any]:
    """The ``config.json`` of a share ``removed``."""
    return structured_config(CONFIG, layer_shapes(removed)) if removed else CONFIG


def size_of(shapes: list[LayerShape]) -> Size:
    """Count parameters and KV bytes of layer shapes."""
    config = structured_config(CONFIG, shapes)
    parsed = read_model_shape(config)
    hidden, layers = CONFIG["hidden_size"], 0
    for layer in parsed.layers:
        if layer.attention is not None:
            rows = (layer.attention.num_heads + layer.attention.num_kv_heads) * layer.attention.head_dim
            layers += 2 * rows * hidden + hidden
        if isinstance(layer.ffn, FfnShape):
            layers += 3 * layer.ffn.intermediate_size * hidden + hidden
    total = layers + CONFIG["vocab_size"] * hidden + hidden
    return Size(layers, total, parsed.kv_bytes_per_token(itemsize=2))


def write(folder: Path, removed: float) -> Path:
    """Write one model; an existing complete one is kept.

    Args:
        folder: destination, made under a temporary name first.
        removed: share of the layers' parameters that is gone.
    """
    if (folder / "config.json").is_file():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(SEED)
    hidden = CONFIG["hidden_size"]
    tensors = {
        "model.embed_tokens.weight": _random(CONFIG["vocab_size"], hidden, generator),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for index, shape in enumerate(layer_shapes(removed)):
        for name, tensor in _layer(shape, generator).items():
            tensors[f"model.layers.{index}.{name}"] = tensor
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(partial)
    (partial / "config.json").write_text(json.dumps(model_config(removed), indent=2))
    partial.replace(folder)
    return folder


def _random(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, _STD, generator=generator)


def _layer(shape: LayerShape, generator: torch.Generator) -> dict[str, Tensor]:
    hidden, dim = CONFIG["hidden_size"], CONFIG["head_dim"]
    query, kv, width = (
        shape.num_attention_heads * dim,
        shape.num_key_value_heads * dim,
        shape.intermediate_size,
    )
    sizes: dict[str, tuple[int, int]] = {}
    norms = []
    if query:
        norms.append("input_layernorm")
        sizes |= {
            f"self_attn.{part}_proj": (rows, hidden)
            for part, rows in zip("qkv", (query, kv, kv), strict=True)
        }
        sizes["self_attn.o_proj"] = (hidden, query)
    if width:
        norms.append("post_attention_layernorm")
        sizes |= {f"mlp.{part}_proj": (width, hidden) for part in ("gate", "up")}
        sizes["mlp.down_proj"] = (hidden, width)
    ones = {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
    return ones | {f"{name}.weight": _random(*size, generator) for name, size in sizes.items()}


def _write_tokenizer(folder: Path) -> None:
    """One word for every id, so that a server can spell whatever the model emits."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(CONFIG["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w128001"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def facts(kv_cache_gib: float) -> list[dict[str, Any]]:
    """Size, ratios and predicted KV tokens of every model, the dense one first."""
    sizes = {name: size_of(layer_shapes(removed)) for name, removed in MODELS.items()}
    dense = sizes["dense"]
    return [
        {
            "model": name,
            "parameters": size.total,
            "parameter_ratio": dense.total / size.total,
            "layers_ratio": dense.layers / size.layers,
            "kv_token_bytes": size.kv_token_bytes,
            "kv_tokens": size.kv_tokens(int(kv_cache_gib * 2**30)),
        }
        for name, size in sizes.items()
    ]


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the models; those that exist are kept.")],
    only: Annotated[str | None, typer.Option(help=f"One of {', '.join(MODELS)} instead of all.")] = None,
    kv_cache_gib: Annotated[float, typer.Option(help="KV cache for which tokens are predicted.")] = 1.0,
) -> None:
    """Write the models and print what to expect of them.

    Example: python -m bench.pruned_shapes out/pruned-shapes
    """
    if only is not None and only not in MODELS:
        raise UserError(f"--only {only!r}: choose of {', '.join(MODELS)}")
    for name in [only] if only else MODELS:
        write(out / name, MODELS[name])
    for row in facts(kv_cache_gib):
        typer.echo(
            f"{row['model']:<10} {row['parameters'] / 1e6:8.1f} M parameters, "
            f"ratio {row['parameter_ratio']:.3f} "
            f"(layers alone {row['layers_ratio']:.3f}); KV {row['kv_token_bytes']} bytes a token, "
            f"{row['kv_tokens']} tokens in {kv_cache_gib:g} GiB"
        )


def run() -> int:
    """Run with user errors as one sentence and exit code 2."""
    try:
        typer.run(main)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(run())
