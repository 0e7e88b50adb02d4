"""The kernel table on a CPU: 2:4 against dense, weights streamed from memory, all in one run.

Every product has enough copies of its weight to exceed the last-level cache several times, so that each call
reads from memory; all products of a row are interleaved, and pure reading is timed between them, so that a
busy machine disturbs them alike. With one thread the clock is the thread's CPU time, which preemption does
not touch; with more it is wall time, and other load spoils it. ``limit_fraction`` is the time that reading
the resident weight takes over the product's: no product of one token can exceed 1 except through caches.
"""

import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.environment import describe
from bench.kernels_dense import Baseline, baselines, on_huge_pages
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels import library
from vllm_sparse.kernels.base import ActivationQuant, Backend, CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.dispatch import get_backend
from vllm_sparse.sparse24.bitmask import pack_mask
from vllm_sparse.sparse24.mask import topk_mask

SCHEMA = "vllm-sparse/bench-kernels/1"
# Projections as vLLM fuses them (qkv, o, gate_up, down), N x K.
MODEL_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-3.2-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),
    "llama-3.2-3b": ((5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)),
    "llama-3.1-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "qwen3-0.6b": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    "qwen3-4b": ((6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)),
}
DEFAULT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
QUICK_SHAPES = ((16384, 2048), (2048, 8192))
QUICK_TOKENS = (1, 8, 64)
_NONE = ActivationQuant.NONE
# Name in the table -> (weight, activations, scale group, format of vLLM's dense counterpart).
FORMATS: dict[str, tuple[WeightFormat, ActivationQuant, int | None, str]] = {
    "bf16": (WeightFormat.BF16, _NONE, None, "bf16"),
    "int8": (WeightFormat.INT8, _NONE, None, "int8"),
    "w8a8-int8": (WeightFormat.INT8, ActivationQuant.INT8_PER_TOKEN, None, "int8"),
    "fp8": (WeightFormat.FP8_E4M3, _NONE, None, "fp8"),
    "int4-g128": (WeightFormat.INT4, _NONE, 128, "int4"),
    "w4a8-g128": (WeightFormat.INT4, ActivationQuant.INT8_PER_TOKEN, 128, "int4"),
}
CACHE_MULTIPLE = 4
_MIN_READ_BYTES = 256 << 20


@dataclass(frozen=True)
class Row:
    """One line of the table; fields up to ``ratio_vs_vllm_dense`` are the published contract.

    Attributes:
        format: what is stored; dense baselines are ``dense-...``.
        us: median time of a call in microseconds.
        gbs: resident weight bytes over ``us``, GB/s.
        limit_fraction: time to read those bytes over ``us``.
        ratio_vs_best_dense: the best unquantised dense product's time over ``us``, of bf16 or, where that
            competes, float32; above 1 is faster than dense.
        ratio_vs_vllm_dense: the same against what vLLM runs for the dense counterpart of the format.
        us_min: fastest call.
        us_iqr: distance of the quartiles, the spread.
        best_dense: which backend was the best dense one.
    """

    format: str
    backend: str
    n: int
    k: int
    m: int
    us: float
    gbs: float
    limit_fraction: float
    ratio_vs_best_dense: float | None
    ratio_vs_vllm_dense: float | None
    us_min: float
    us_iqr: float
    best_dense: str | None


@dataclass
class _Product:
    """A way to compute a layer, with all its weight copies and its times in seconds."""

    format: str
    backend: str
    weight_bytes: int
    calls: list[Callable[[Tensor], object]]
    counterpart: str | None = None
    vllm: bool = False
    seconds: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    @property
    def median(self) -> float:
        return self.quantile(0.5)


def last_level_cache() -> int:
    """Bytes of the largest cache, 32 MiB if the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes) or 32 << 20


def random_weight(spec: LinearSpec) -> CanonicalWeight:
    """A random canonical 2:4 weight for ``spec``."""
    mask = topk_mask(torch.rand(spec.n, spec.k))
    shape = (spec.n, spec.k // 2)
    if spec.weight in (WeightFormat.INT8, WeightFormat.INT4):
        low, high = (-127, 128) if spec.weight is WeightFormat.INT8 else (-8, 8)
        values = torch.randint(low, high, shape, dtype=torch.int8)
    else:
        dtype = torch.float8_e4m3fn if spec.weight is WeightFormat.FP8_E4M3 else spec.activation_dtype
        values = torch.randn(shape).to(dtype)
    if spec.weight is WeightFormat.BF16:
        return CanonicalWeight(values, pack_mask(mask))
    groups = 1 if spec.group_size is None else spec.k // spec.group_size
    return CanonicalWeight(values, pack_mask(mask), torch.rand(spec.n, groups) * 0.01 + 0.001)


def make_spec(name: str, n: int, k: int) -> LinearSpec:
    """A layer of one of :data:`FORMATS`.

    Raises:
        UnsupportedError: there is no such format.
    """
    if name not in FORMATS:
        raise UnsupportedError(f"no format {name!r} to measure; there are {', '.join(FORMATS)}")
    weight, quant, group, _ = FORMATS[name]
    return LinearSpec(n, k, weight, torch.bfloat16, quant, group)


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Shapes from model names and NxK, separated by commas, without repeats.

    Raises:
        UnsupportedError: a part is neither.
    """
    shapes: list[tuple[int, int]] = []
    for part in text.split(","):
        word = part.strip().lower()
        n, x, k = word.partition("x")
        if word in MODEL_SHAPES:
            shapes += MODEL_SHAPES[word]
        elif x and n.isdigit() and k.isdigit() and int(n) % 16 == 0 and int(k) % 128 == 0 and int(n) * int(k):
            shapes.append((int(n), int(k)))
        else:
            raise UnsupportedError(
                f"shape {part!r}: give NxK with N a multiple of 16 and K of 128 (output x input features), "
                f"or a model of {', '.join(MODEL_SHAPES)}"
            )
    return list(dict.fromkeys(shapes))


def _sparse_product(name: str, n: int, k: int, copies_bytes: int, backend: Backend) -> _Product:
    spec = make_spec(name, n, k)
    weight = random_weight(spec)
    first = backend.pack(spec, weight)
    weight_bytes = first.packed.numel() + (0 if first.scale is None else first.scale.numel() * 4)
    # As serving keeps them.
    copies = [
        replace(first, packed=backend.settle(first.packed))
        for _ in range(math.ceil(copies_bytes / weight_bytes))
    ]

    def call(packed: Tensor, scale: Tensor | None) -> Callable[[Tensor], object]:
        return lambda x: backend.linear(spec, x, packed, scale, None)

    calls = [call(c.packed, c.scale) for c in copies]
    return _Product(name, backend.name, weight_bytes, calls, counterpart=FORMATS[name][3])


def _dense_product(baseline: Baseline, n: int, k: int, copies_bytes: int) -> _Product:
    weight_bytes = int(n * k * baseline.weight_bits / 8)
    calls = [baseline.make(n, k) for _ in range(math.ceil(copies_bytes / weight_bytes))]
    return _Product(
        baseline.format,
        baseline.backend,
        weight_bytes,
        calls,
        vllm=baseline.vllm,
    )


def clock() -> Callable[[], float]:
    """Seconds: of this thread's CPU time if it works alone, else of wall time."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


class _ReadProbe:
    """Pure reading of a buffer far larger than the caches."""

    def __init__(self, cache: int) -> None:
        self._clock = clock()
        self._data = on_huge_pages(
            torch.ones(max(_MIN_READ_BYTES, CACHE_MULTIPLE * cache), dtype=torch.uint8)
        )
        self.rates: list[float] = []

    def sample(self) -> None:
        start = self._clock()
        torch.ops.vllm_sparse.read_all(self._data)
        self.rates.append(self._data.numel() / (self._clock() - start) / 1e9)

    def gbs(self) -> float:
        """Median rate since the last call, in GB/s."""
        rate = sorted(self.rates)[len(self.rates) // 2]
        self.rates.clear()
        return rate


def _time(products: list[_Product], m: int, k: int, repeats: int, probe: _ReadProbe) -> None:
    """Interleave ``repeats`` rounds over all products, fresh times only."""
    x = torch.randn(m, k, dtype=torch.bfloat16)
    now = clock()
    for product in products:
        product.seconds.clear()
        product.calls[0](x)
    for turn in range(repeats):
        probe.sample()
        for product in products:
            # Every copy in turn: a copy is read again only after all the others.
            call = product.calls[turn % len(product.calls)]
            start = now()
            call(x)
            product.seconds.append(now() - start)


def _rows(products: list[_Product], n: int, k: int, m: int, read_gbs: float) -> list[Row]:
    dense = [p for p in products if p.counterpart is None]
    best = min((p for p in dense if p.format in ("bf16", "float32")), key=lambda p: p.median)
    rows = []
    for p in products:
        counterpart = p.counterpart or p.format
        vllm = next((d for d in dense if d.vllm and d.format == counterpart), None)
        rows.append(
            Row(
                format=p.format if p.counterpart else f"dense-{p.format}",
                backend=p.backend,
                n=n,
                k=k,
                m=m,
                us=p.median * 1e6,
                gbs=p.weight_bytes / p.median / 1e9,
                limit_fraction=p.weight_bytes / (read_gbs * 1e9) / p.median,
                ratio_vs_best_dense=best.median / p.median,
                ratio_vs_vllm_dense=None if vllm is None else vllm.median / p.median,
                us_min=min(p.seconds) * 1e6,
                us_iqr=(p.quantile(0.75) - p.quantile(0.25)) * 1e6,
                best_dense=best.backend,
            )
        )
    return rows


def run(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    formats: Sequence[str],
    repeats: int,
    say: Callable[[Row], None],
) -> dict[str, Any]:
    """Measure and return the document of the ``bench-kernels/1`` schema.

    Args:
        shapes: layers, ``(output features, input features)``.
        tokens: batch sizes.
        formats: names of :data:`FORMATS`.
        repeats: timed calls of every product per row (a quarter of it from 256 tokens on, at least 5).
        say: receives each row as it is measured.

    Raises:
        UnsupportedError: the compiled kernels are not usable here, or a format is unknown.
    """
    reason = library.load_failure()
    if reason is not None:
        raise UnsupportedError(f"nothing to measure: {reason}")
    backend = get_backend("cpu")
    cache = last_level_cache()
    probe = _ReadProbe(cache)
    competitors = baselines({FORMATS[name][3] for name in formats if name in FORMATS})
    rows: list[Row] = []
    rates: list[float] = []
    for n, k in shapes:
        products = [_sparse_product(name, n, k, CACHE_MULTIPLE * cache, backend) for name in formats]
        products += [_dense_product(baseline, n, k, CACHE_MULTIPLE * cache) for baseline in competitors]
        for m in tokens:
            _time(products, m, k, repeats if m < 256 else max(5, repeats // 4), probe)
            rates.append(probe.gbs())
            for row in _rows(products, n, k, m, rates[-1]):
                rows.append(row)
                say(row)
    return document(rows, rates)


def document(rows: Iterable[Row], rates: Sequence[float]) -> dict[str, Any]:
    """The result as JSON-ready values."""
    return {
        "schema": SCHEMA,
        "read_bandwidth_gbs": sorted(rates)[len(rates) // 2],
        "threads": torch.get_num_threads(),
        "clock": "thread CPU time" if clock() is time.thread_time else "wall time",
        "isa": library.current_isa().name.lower(),
        "machine": platform.machine(),
        "environment": describe(),
        "rows": [asdict(row) for row in rows],
    }
