"""Checkpoint tensors against declared shapes, from safetensors headers alone.

A file starts with the length of its header (8 bytes, little-endian), then that many bytes of JSON:
tensor name → dtype, shape, byte range (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from vllm_sparse.errors import FormatError
from vllm_sparse.models.layer_config import (
    AttentionShape,
    FfnShape,
    LatentShape,
    LayerShape,
    ModelShape,
    MoeShape,
)

#: Above this many bytes a header cannot be real, whatever its length field says.
_MAX_HEADER = 100 * 2**20

Shapes = Mapping[str, tuple[int, ...]]


def read_headers(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a folder's safetensors files.

    Raises:
        FormatError: A file is cut short or is not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if size <= _MAX_HEADER else b""
        try:
            header = json.loads(text)
            entries = {
                name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(
                f"{path}: not a readable safetensors file ({error}). Copy or download it again."
            ) from error
        shapes.update(entries)
    return shapes


def check_folder(shape: ModelShape, folder: str | Path) -> None:
    """Check a local checkpoint; anything else (a hub id) is left to the loader.

    Raises:
        FormatError: A tensor's shape differs from what config.json declares for its layer.
    """
    path = Path(folder)
    if path.is_dir():
        check_tensors(shape, read_headers(path))


def check_tensors(shape: ModelShape, found: Shapes) -> None:
    """Check a checkpoint's tensors against the declared layers.

    Dense weights and biases must have the declared shape; tensors stored in another form
    (compressed, quantised) are checked by their own loaders. There must be none for a skipped part,
    for a layer past the last one, or for a bias that is not declared.

    Args:
        shape: Declared shapes.
        found: Tensor name → shape, as in the file headers.

    Raises:
        FormatError: Names the tensor, what it is, and what config.json declares.
    """
    declared = dict(declared_tensors(shape))
    for name, wanted in declared.items():
        if name in found:
            check_tensor(name, found[name], wanted)
        if name.endswith(".weight"):
            _refuse_undeclared_bias(name.removesuffix("weight") + "bias", declared, found)
    _refuse_tensors_of_absent_parts(shape, found)


def _refuse_undeclared_bias(name: str, declared: Shapes, found: Shapes) -> None:
    if name in found and name not in declared:
        raise FormatError(
            f"{name}: the checkpoint has this bias, but config.json does not declare it. Set o_proj_bias or "
            "down_proj_bias for the layer (a bias on that projection alone), or the family's own flag."
        )


def _refuse_tensors_of_absent_parts(shape: ModelShape, found: Shapes) -> None:
    absent = tuple(_absent_prefixes(shape))
    layer_name = re.compile(re.escape(shape.family.layer_prefix).replace(re.escape("{i}"), r"(\d+)"))
    for name in found:
        match = layer_name.match(name)
        if match and int(match[1]) >= len(shape.layers):
            raise FormatError(
                f"{name}: config.json declares {len(shape.layers)} layers. Renumber those that were kept "
                "from 0, or correct the number of layers."
            )
        if absent and name.startswith(absent) and "rotary_emb" not in name:
            raise FormatError(
                f"{name}: config.json skips this part of its layer. "
                'Remove the tensor, or the word from "skip".'
            )


def _absent_prefixes(shape: ModelShape) -> Iterator[str]:
    """Beginnings of the tensor names that skipped parts would have."""
    ffn_names = {"opt": ("fc1.", "fc2."), "mixtral": ("block_sparse_moe.",)}
    for layer in shape.layers:
        prefix = shape.family.layer_prefix.format(i=layer.index)
        if layer.attention is None:
            yield f"{prefix}{shape.family.attention_name}."
        if layer.ffn is None:
            for name in ffn_names.get(shape.family.model_type, ("mlp.",)):
                yield prefix + name


def check_tensor(name: str, actual: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Compare one tensor's shape with the declared one.

    Raises:
        FormatError: They differ.
    """
    if actual != wanted:
        raise FormatError(
            f"{name}: the tensor is {_by(actual)}, but config.json declares {_by(wanted)} for this layer. "
            "Correct per_layer_config, or convert the checkpoint again."
        )


def declared_tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield ``(full name, shape)`` of every dense layer weight the model declares."""
    for layer in shape.layers:
        prefix = shape.family.layer_prefix.format(i=layer.index)
        for name, wanted in expected_tensors(shape, layer):
            yield prefix + name, wanted


def expected_tensors(shape: ModelShape, layer: LayerShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield ``(name inside the layer, shape)`` of the weights a dense checkpoint holds.

    Biases follow the flags of the shapes. Norms are left out: pruning does not touch them.
    """
    hidden = shape.hidden_size
    if isinstance(layer.attention, LatentShape):
        yield from _latent_tensors(shape.family.attention_name, layer.attention, hidden)
    elif layer.attention is not None:
        yield from _attention_tensors(shape, layer.attention, hidden)
    if isinstance(layer.ffn, FfnShape):
        yield from _ffn_tensors(shape, layer.ffn, hidden)
    elif isinstance(layer.ffn, MoeShape):
        yield from _moe_tensors(shape, layer.ffn, hidden)


def _attention_tensors(
    shape: ModelShape, attention: AttentionShape, hidden: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    query = attention.num_heads * attention.head_dim
    kv = attention.num_kv_heads * attention.head_dim
    name = shape.family.attention_name
    if shape.family.model_type == "gpt2":
        # GPT-2's Conv1D stores (in, out), with q, k and v fused.
        yield f"{name}.c_attn.weight", (hidden, query + 2 * kv)
        yield f"{name}.c_attn.bias", (query + 2 * kv,)
        yield f"{name}.c_proj.weight", (query, hidden)
        yield f"{name}.c_proj.bias", (hidden,)
        return
    out = "out_proj" if shape.family.model_type == "opt" else "o_proj"
    for part, rows in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
        yield f"{name}.{part}.weight", (rows, hidden)
        if attention.qkv_bias:
            yield f"{name}.{part}.bias", (rows,)
    yield f"{name}.{out}.weight", (hidden, query)
    if attention.o_bias:
        yield f"{name}.{out}.bias", (hidden,)


def _latent_tensors(name: str, attention: LatentShape, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    query = attention.num_heads * (attention.qk_nope_dim + attention.rope_dim)
    if attention.q_rank is None:
        yield f"{name}.q_proj.weight", (query, hidden)
    else:
        yield f"{name}.q_a_proj.weight", (attention.q_rank, hidden)
        yield f"{name}.q_b_proj.weight", (query, attention.q_rank)
    yield f"{name}.kv_a_proj_with_mqa.weight", (attention.head_dim, hidden)
    expanded = attention.num_heads * (attention.qk_nope_dim + attention.v_dim)
    yield f"{name}.kv_b_proj.weight", (expanded, attention.kv_rank)
    yield f"{name}.o_proj.weight", (hidden, attention.num_heads * attention.v_dim)
    if attention.o_bias:
        yield f"{name}.o_proj.bias", (hidden,)


def _ffn_tensors(shape: ModelShape, ffn: FfnShape, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = ffn.intermediate_size
    if shape.family.model_type == "gpt2":
        yield "mlp.c_fc.weight", (hidden, width)
        yield "mlp.c_fc.bias", (width,)
        yield "mlp.c_proj.weight", (width, hidden)
        yield "mlp.c_proj.bias", (hidden,)
        return
    ups: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down = "mlp.down_proj"
    if shape.family.model_type == "opt":
        ups, down = (("fc1",), "fc2")
    for part in ups:
        yield f"{part}.weight", (width, hidden)
        if ffn.up_bias:
            yield f"{part}.bias", (width,)
    yield f"{down}.weight", (hidden, width)
    if ffn.down_bias:
        yield f"{down}.bias", (hidden,)


def _moe_tensors(shape: ModelShape, moe: MoeShape, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    block, ups, down = "mlp", ("gate_proj", "up_proj"), "down_proj"
    if shape.family.model_type == "mixtral":
        block, ups, down = "block_sparse_moe", ("w1", "w3"), "w2"
    yield f"{block}.gate.weight", (moe.num_experts, hidden)
    if moe.correction_bias:
        yield f"{block}.gate.e_score_correction_bias", (moe.num_experts,)
    for expert in range(moe.num_experts):
        for part in ups:
            yield f"{block}.experts.{expert}.{part}.weight", (moe.intermediate_size, hidden)
        yield f"{block}.experts.{expert}.{down}.weight", (hidden, moe.intermediate_size)
    if moe.shared_width:
        for part in ups:
            yield f"{block}.shared_experts.{part}.weight", (moe.shared_width, hidden)
        yield f"{block}.shared_experts.{down}.weight", (hidden, moe.shared_width)


def _by(dims: tuple[int, ...]) -> str:
    return " x ".join(map(str, dims))
