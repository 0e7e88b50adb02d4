"""Readers of training-loop checkpoints: nanoGPT's, AST's (GPT-2 and LLaMA) and 2by4-pretrain's.

They hold the *latent* dense weights. What the model computed with is the latent weight times a mask:

- ``nanogpt``: no mask (also the end of 2by4-pretrain, whose last sixth trains dense).
- ``ast``: top 2 of 4 by magnitude; AST's LLaMA checkpoints save the mask, and the saved one is used. An
  optional SLoRB branch (``x_proj``, ``SLoRB_Weight`` or ``SLoRA_Weight``) becomes a low-rank branch.
- ``2by4``: the transposable mask on the feed-forward linears: in each 4x4 block the best of the 90 patterns
  with two ones in every row and column.

Sources: thu-ml/Adaptive-Sparse-Trainer and huyz2023/2by4-pretrain, as their checkpoints are laid out.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.layers import Kind, is_conv1d, kind_of
from converters.readers.base import LOW_RANK_A, LOW_RANK_B, Entry, Loaded, check_finite
from converters.safetensors_io import TensorSpec
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import is_24, topk_mask
from vllm_sparse.sparse24.mask import magnitude

_PREFIXES = ("_orig_mod.", "module.")
_DROPPED = re.compile(r"(^|\.)(teacher\.|rotary|attn\.bias$|.*\.inital_mask$|.*inv_freq$)")
_BRANCH_B = ("SLoRB_Weight", "SLoRA_Weight")
_BRANCH_A = "x_proj"
_COMPOSER = re.compile(r"^(?:state\.)?(?:model\.)+transformer\.(.+)$")
_COMPOSER_NAMES = {"wte": "model.embed_tokens", "ln_f": "model.norm", "output": "lm_head"}
_COMPOSER_BLOCKS = {
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.out_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
}


def canonical_name(name: str) -> str | None:
    """The Hugging Face name of a tensor of a training checkpoint; None for what the model does not need."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if _DROPPED.search(name) or ".teacher." in f".{name}":
        return None
    composer = _COMPOSER.match(name)
    if composer is None or composer[1][:2] == "h." or name.startswith("transformer."):
        return name
    rest = composer[1]
    module, _, leaf = rest.rpartition(".")
    if module in _COMPOSER_NAMES:
        return f"{_COMPOSER_NAMES[module]}.{leaf}"
    block = re.match(r"^blocks\.(\d+)\.(.+)$", module)
    if block and block[2] in _COMPOSER_BLOCKS:
        return f"model.layers.{block[1]}.{_COMPOSER_BLOCKS[block[2]]}.{leaf}"
    raise FormatError(f"{name!r} is not a tensor of a known training checkpoint")


def gpt2_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's GPT-2 config of nanoGPT's ``model_args``.

    Raises:
        FormatError: they are missing or not numbers.
    """
    args = facts.get("model_args") or facts.get("config")
    names = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions"}
    if not isinstance(args, Mapping) or any(
        type(args.get(key)) is not int or args[key] <= 0 for key in names
    ):
        raise FormatError(
            "the checkpoint does not say its n_layer, n_head, n_embd and block_size; put a config.json next "
            "to it"
        )
    vocabulary = args.get("vocab_size")
    config: dict[str, Any] = {new: args[old] for old, new in names.items()}
    return config | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocabulary if type(vocabulary) is int else 50304,
        # nanoGPT uses the exact GELU.
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


@cache
def transposable_patterns() -> Tensor:
    """All 4x4 0/1 patterns with two ones in each row and column: bool ``[90, 4, 4]``."""
    rows = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    found = [
        pattern
        for pattern in itertools.product(rows, repeat=4)
        if all(sum(row[column] for row in pattern) == 2 for column in range(4))
    ]
    return torch.tensor(found, dtype=torch.bool)


def transposable_mask(weight: Tensor) -> Tensor:
    """The mask that is 2:4 along rows and columns and keeps most magnitude in every 4x4 block.

    Args:
        weight: ``[rows, cols]``, both multiples of 4.

    Raises:
        FormatError: they are not.
    """
    rows, cols = weight.shape
    if rows % 4 or cols % 4:
        raise FormatError(f"a transposable mask needs multiples of 4; found [{rows}, {cols}]")
    blocks = magnitude(weight).to(torch.float32).reshape(rows // 4, 4, cols // 4, 4).permute(0, 2, 1, 3)
    patterns = transposable_patterns()
    scores = blocks.reshape(-1, 16) @ patterns.reshape(-1, 16).to(torch.float32).t()
    best = patterns[scores.argmax(-1)].reshape(rows // 4, cols // 4, 4, 4)
    return best.permute(0, 2, 1, 3).reshape(rows, cols)


def pooling_width(projection: Tensor) -> int | None:
    """Block width of a 0/1 block-sum matrix ``[r, in]``; None if it is any other matrix."""
    ranks, width = projection.shape
    if ranks == 0 or width % ranks:
        return None
    pooled = torch.eye(ranks).repeat_interleave(width // ranks, dim=1)
    return width // ranks if torch.equal(projection.to(torch.float32), pooled) else None


@dataclass(frozen=True)
class _Source:
    """A weight's tensors in the training checkpoint."""

    weight: str
    mask: str | None = None
    branch_a: str | None = None
    branch_b: str | None = None


class TrainedReader:
    """Canonical tensors of a training checkpoint.

    Args:
        checkpoint: its tensors, as they came out of the pickle.
        method: ``nanogpt``, ``ast`` or ``2by4``.

    Raises:
        FormatError: tensors that belong to no known layout.
    """

    def __init__(self, checkpoint: Checkpoint, method: str) -> None:
        self.format = method
        self.checkpoint = checkpoint
        self.validated = False
        self._names: dict[str, str] = {}
        for name in checkpoint.tensors:
            new = canonical_name(name)
            if new is None:
                continue
            if new in self._names:
                raise FormatError(f"{name!r} and {self._names[new]!r} are both {new!r}")
            self._names[new] = name
        self._sources: dict[str, _Source] = {}
        self._pooled = self._all_pooled()

    def _all_pooled(self) -> bool:
        """Whether every SLoRB projection still is the block-sum matrix, so that none needs storing."""
        projections = [self._names[name] for name in self._names if name.endswith(f".{_BRANCH_A}")]
        return all(pooling_width(self.checkpoint.read(name)) for name in projections)

    def entries(self) -> Sequence[Entry]:
        """See :class:`~converters.readers.base.Reader`."""
        entries = []
        consumed: set[str] = set()
        for name in self._names:
            if name.endswith(".weight"):
                entry = self._weight(name)
                if entry is not None:
                    entries.append(entry)
                consumed |= {name, *self._extras(name.removesuffix(".weight"))}
        entries += [self._plain(name) for name in self._names if name not in consumed]
        return entries + self._zero_biases(entries)

    def _zero_biases(self, entries: Sequence[Entry]) -> list[Entry]:
        """GPT-2 in Hugging Face has every bias; nanoGPT can train without, which is the same as zeros."""
        if self.checkpoint.config.get("model_type") != "gpt2":
            return []
        added = []
        for entry in entries:
            name = f"{entry.module}.bias"
            norm = entry.module.rpartition(".")[2].startswith("ln_") and entry.name.endswith(".weight")
            if (entry.conv1d or norm) and name not in self._names:
                added.append(Entry(name, entry.shape[:1], entry.dtype, Kind.OTHER, (), entry.shard))
        return added

    def _extras(self, module: str) -> set[str]:
        return {f"{module}.{suffix}" for suffix in ("mask", _BRANCH_A, *_BRANCH_B)}

    def _plain(self, name: str) -> Entry:
        info = self.checkpoint.tensors[self._names[name]]
        return Entry(name, info.shape, info.dtype, Kind.OTHER, (info.name,), info.path.name)

    def _weight(self, name: str) -> Entry | None:
        if (
            name == "lm_head.weight"
            and self.checkpoint.config.get("tie_word_embeddings")
            and self._is_tied(name)
        ):
            return None
        info = self.checkpoint.tensors[self._names[name]]
        module = name.removesuffix(".weight")
        kind = kind_of(name, len(info.shape))
        source = self._source(module)
        self._sources[name] = source
        masked = kind is Kind.LINEAR and self._is_masked(module)
        parts = [part for part in (source.weight, source.mask, source.branch_a, source.branch_b) if part]
        return Entry(
            name=name,
            shape=info.shape,
            dtype=info.dtype,
            kind=kind,
            parts=tuple(parts),
            shard=info.path.name,
            stored=self.format,
            claims_24=masked,
            conv1d=kind is Kind.LINEAR and is_conv1d(module, self.checkpoint.config),
            companions=self._branch_specs(module, info.shape, source),
        )

    def _is_tied(self, name: str) -> bool:
        other = self._names.get("transformer.wte.weight") or self._names.get("model.embed_tokens.weight")
        return other is not None and torch.equal(
            self.checkpoint.read(self._names[name]), self.checkpoint.read(other)
        )

    def _source(self, module: str) -> _Source:
        def find(*suffixes: str) -> str | None:
            return next(
                (self._names[f"{module}.{s}"] for s in suffixes if f"{module}.{s}" in self._names), None
            )

        return _Source(self._names[f"{module}.weight"], find("mask"), find(_BRANCH_A), find(*_BRANCH_B))

    def _is_masked(self, module: str) -> bool:
        if self.format == "ast":
            return True
        return self.format == "2by4" and ".mlp." in module

    def _branch_specs(self, module: str, shape: tuple[int, ...], source: _Source) -> tuple[TensorSpec, ...]:
        if source.branch_b is None and source.branch_a is None:
            return ()
        if source.branch_a is None or source.branch_b is None or self.format != "ast":
            raise FormatError(
                f"{module} has half of a SLoRB branch, or one that format {self.format} does not know"
            )
        a, b = self.checkpoint.tensors[source.branch_a], self.checkpoint.tensors[source.branch_b]
        if len(a.shape) != 2 or a.shape[1] != shape[1] or b.shape != (shape[0], a.shape[0]):
            raise FormatError(
                f"{module}: the SLoRB branch {list(b.shape)} x {list(a.shape)} does not fit a weight "
                f"{list(shape)}"
            )
        specs = [TensorSpec(f"{module}.{LOW_RANK_B}", b.dtype, b.shape)]
        if not self._pooled:
            specs.append(TensorSpec(f"{module}.{LOW_RANK_A}", a.dtype, a.shape))
        return tuple(specs)

    def load(self, entry: Entry) -> Loaded:
        """See :class:`~converters.readers.base.Reader`."""
        if not entry.parts:
            return Loaded(torch.zeros(entry.shape, dtype=entry.dtype))
        source = self._sources.get(entry.name)
        weight = self.checkpoint.read(entry.parts[0])
        if not self.validated:
            check_finite(weight, entry.name)
        loaded = Loaded(weight)
        if source is None:
            return loaded
        if entry.claims_24:
            mask = self._mask(entry, weight, source)
            loaded.weight = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))
        for spec in entry.companions:
            part = source.branch_b if spec.name.endswith(LOW_RANK_B) else source.branch_a
            loaded.companions[spec.name] = self.checkpoint.read(part or "")
            check_finite(loaded.companions[spec.name], spec.name)
        return loaded

    def _mask(self, entry: Entry, weight: Tensor, source: _Source) -> Tensor:
        if self.format == "2by4":
            return transposable_mask(weight)
        if source.mask is None:
            return topk_mask(magnitude(weight))
        mask = self.checkpoint.read(source.mask)
        if mask.shape != weight.shape or not is_24(mask.to(torch.int8)):
            raise FormatError(f"{source.mask!r} is not a 2:4 mask of {entry.name}")
        return mask.to(torch.bool)
