"""What lies between the products of a decode step, in about as few kernels as a server runs.

Norms, rotary embedding and activation are compiled. Attention of one query per sequence is computed by
whichever of torch's ways is the fastest at hand: which of them share a long context among multiprocessors
depends on torch's version and the GPU.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from bench.cuda_timing import Timing, cache_bytes, copies_needed
from vllm_sparse.errors import UnsupportedError

logger = logging.getLogger(__name__)

Timer = Callable[[Mapping[str, Sequence[Callable[[], object]]]], dict[str, Timing]]
# (query [m, heads, head_dim], keys, values [m, kv_heads, context, head_dim]) -> [m, heads * head_dim]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# Mean distance of two ways' outputs over their mean size: bfloat16 rounds to 2^-9.
_SAME = 0.01
_LIBRARIES = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}
# Recompilations of one function: one per token count.
_TOKEN_COUNTS = 64
_EPSILON = 1e-5


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm of rows; spelt out, because the compiler may leave torch's own alone."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)).to(x.dtype)


def add_norm(x: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream with a layer's result added, and its norm."""
    total = x + change
    return total, norm(total)


def activate(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the fused product's two halves."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    # A flip exchanges the halves: to the compiler that is elementwise, joining two halves is not.
    halves = x.float().unflatten(-1, (2, -1))
    return (halves * cosine + halves.flip(-2) * sine).flatten(-2).to(x.dtype)


def rotate_and_store(
    qkv: Tensor, key_slot: Tensor, value_slot: Tensor, cosine: Tensor, sine: Tensor
) -> Tensor:
    """Rotary embedding; keys and values go to their places in the cache.

    Args:
        qkv: ``[m, (heads + 2 * kv_heads) * head_dim]``.
        key_slot: ``[m, kv_heads, head_dim]``, overwritten.
        value_slot: the same.
        cosine: ``[head_dim / 2]``, float32, of the new token's position.
        sine: ``[2, head_dim / 2]``, negative for the first halves of the heads.

    Returns:
        The query ``[m, heads, head_dim]``.
    """
    m, kv_heads, head_dim = key_slot.shape
    heads = qkv.view(m, -1, head_dim)
    query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    key_slot.copy_(_rotate(key, cosine, sine))
    value_slot.copy_(value)
    return _rotate(query, cosine, sine)


@dataclass(frozen=True)
class Glue:
    """The functions of this module, compiled or as they are."""

    norm: Callable[[Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    activate: Callable[[Tensor], Tensor]
    rotate_and_store: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    attentions: Mapping[str, Attention]


def make_glue(compiled: bool = True) -> Glue:
    """Compile the functions, each for the token counts that it meets; at its first call."""
    attentions = {name: _library_attention(backend) for name, backend in _LIBRARIES.items()}
    if not compiled:
        return Glue(
            norm,
            add_norm,
            activate,
            rotate_and_store,
            attentions | {"matmul": _matmul_attention, "flex": _flex_attention},
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _TOKEN_COUNTS)
    return Glue(
        torch.compile(norm, fullgraph=True, dynamic=False),
        torch.compile(add_norm, fullgraph=True, dynamic=False),
        torch.compile(activate, fullgraph=True, dynamic=False),
        torch.compile(rotate_and_store, fullgraph=True, dynamic=False),
        attentions
        | {
            "matmul": torch.compile(_matmul_attention, fullgraph=True, dynamic=False),
            "flex": torch.compile(_flex_attention, fullgraph=True, dynamic=False),
        },
    )


def _grouped(query: Tensor, keys: Tensor) -> Tensor:
    """One query a sequence: the heads that share keys are the rows of one small product."""
    return query.reshape(query.shape[0], keys.shape[1], -1, query.shape[2])


def _library_attention(backend: SDPBackend) -> Attention:
    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(_grouped(query, keys), keys, values)
        return out.reshape(query.shape[0], -1)

    return attend


def _matmul_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = _grouped(query, keys) @ keys.transpose(-1, -2)
    weights = torch.softmax(scores.float() * query.shape[-1] ** -0.5, dim=-1).to(values.dtype)
    return (weights @ values).reshape(query.shape[0], -1)


def _flex_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    out = flex_attention(query.unsqueeze(2), keys, values, enable_gqa=True)
    if not isinstance(out, Tensor):  # a tuple only where more is asked for
        out = out[0]
    return out.reshape(query.shape[0], -1)


def fastest_attention(
    attentions: Mapping[str, Attention], query: Tensor, keys: Tensor, values: Tensor, timer: Timer
) -> tuple[str, dict[str, float]]:
    """Time every way that runs here and agrees with the plain one, on caches that come from memory.

    Returns:
        The name of the fastest, and microseconds of all that took part.

    Raises:
        UnsupportedError: none runs.
    """
    size = keys.nbytes + values.nbytes
    copies = copies_needed(size, cache_bytes(query.device)) if query.is_cuda else 1
    caches = [(keys, values)] + [(keys.clone(), values.clone()) for _ in range(copies - 1)]
    expected = attentions["plain"](query, keys, values).float()
    calls: dict[str, list[Callable[[], object]]] = {}
    for name, attention in attentions.items():
        try:
            distance = (attention(query, keys, values).float() - expected).abs().mean()
        except RuntimeError as error:
            logger.info("attention by %s does not run: %s", name, str(error).partition("\n")[0])
            continue
        if not float(distance) <= _SAME * float(expected.abs().mean()):
            logger.warning("attention by %s is left out: its results differ", name)
            continue
        calls[name] = [_call(attention, query, *cache) for cache in caches]
    if not calls:
        raise UnsupportedError(f"none of {', '.join(attentions)} computes attention on {query.device}")
    times = {name: timing.median for name, timing in timer(calls).items()}
    return min(times, key=lambda name: times[name]), times


def _call(attention: Attention, query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], object]:
    return lambda: attention(query, keys, values)
