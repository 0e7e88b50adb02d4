"""One decode step of a Llama-shaped stack on an NVIDIA GPU, dense against 2:4, as one CUDA graph each.

``python -m bench.decode_stack [--backends triton cuda] [--m 1 8 64] [--json FILE]``. Linears, norms, rotary
embedding and attention over a cache are in it; the head and sampling are not. It needs no vLLM, so it shows
what kernels can give a model where nothing but torch is installed. Random weights: their values do not change
the speed. Both stacks hold the same weight, so their outputs are compared before they are timed, and all that
is not a linear is the same compiled code (:mod:`bench.decode_glue`).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cuda_timing import time_together
from bench.decode_glue import Attention, Glue, Timer, fastest_attention, make_glue
from bench.environment import describe
from bench.files import STANDARD_OUTPUT, check_writable, line_writer, write_document
from bench.kernels_cuda import FORMATS, make_spec, random_weight
from vllm_sparse.errors import NumericsError, UnsupportedError, UserError
from vllm_sparse.kernels.dispatch import get_backend

SCHEMA = "vllm-sparse/decode-stack/1"
Linear = Callable[[Tensor], Tensor]
# Mean distance of the outputs over the mean size of the dense ones: both round activations to bfloat16 after
# every product, in different orders.
_LIMIT = 0.03


@dataclass(frozen=True)
class StackShape:
    """Sizes of the stack.

    Attributes:
        context: tokens in the cache of every sequence.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``[n, k]`` of a layer's products, fused as vLLM fuses them."""
        width = self.heads * self.head_dim
        return {
            "qkv": (width + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, width),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


LLAMA_8B = StackShape(32, 4096, 14336, 32, 8, 128, 1024)


class Stacks:
    """The same random layers as dense products and on 2:4 backends.

    Attributes:
        linears: per way (``dense`` or a backend), per layer, per name, the product.
        weight_bytes: per way, of all linears.
        glue: what lies between the products, the same for every way; compiled unless given.
    """

    def __init__(
        self,
        shape: StackShape,
        name: str,
        backends: Sequence[str],
        device: torch.device,
        glue: Glue | None = None,
    ) -> None:
        if not backends:
            raise UnsupportedError("no backend to measure; name at least one, for example triton")
        self.shape = shape
        self.device = device
        self.glue = glue or make_glue()
        self.linears: dict[str, list[dict[str, Linear]]] = {way: [] for way in ("dense", *backends)}
        self.weight_bytes = dict.fromkeys(self.linears, 0)
        for _ in range(shape.layers):
            for way in self.linears:
                self.linears[way].append({})
            for linear, (n, k) in shape.linears.items():
                self._add(name, linear, n, k, backends)

    def _add(self, name: str, linear: str, n: int, k: int, backends: Sequence[str]) -> None:
        spec = make_spec(name, n, k)
        weight = random_weight(spec, self.device)
        # Numbers up to 8 become weights that keep the activations' size.
        shrink = 0.3 * k**-0.5
        if weight.scale is None:
            weight = type(weight)((weight.values.float() * shrink).to(weight.values.dtype), weight.bitmask)
        else:
            weight = type(weight)(weight.values, weight.bitmask, weight.scale / 0.0625 * shrink)
        for way in backends:
            backend = get_backend(way)
            reason = backend.unsupported_reason(spec, self.device)
            if reason is not None:
                raise UnsupportedError(f"{way} cannot run the {linear} product: {reason}")
            item = backend.pack(spec, weight)
            packed, scale = item.packed, item.scale

            def call(x: Tensor, backend=backend, packed=packed, scale=scale) -> Tensor:  # type: ignore[no-untyped-def]
                out: Tensor = backend.linear(spec, x, packed, scale, None)
                return out

            self.linears[way][-1][linear] = call
            self.weight_bytes[way] += packed.nbytes + (0 if scale is None else scale.nbytes)
        # The dense twin of what the last backend packed: all of them pack the same weight.
        whole = backend.unpack(spec, packed, scale)
        self.linears["dense"][-1][linear] = lambda x: F.linear(x, whole)
        self.weight_bytes["dense"] += whole.nbytes

    def step(self, way: str, inputs: "Inputs", attention: Attention) -> Callable[[], Tensor]:
        """One step on inputs and caches that all ways share; its result is the residual stream."""
        glue, layers = self.glue, self.linears[way]

        def run() -> Tensor:
            x, normed = inputs.x, glue.norm(inputs.x)
            for layer in layers:
                query = glue.rotate_and_store(layer["qkv"](normed), *inputs.slots, *inputs.angles)
                x, normed = glue.add_norm(x, layer["o"](attention(query, inputs.keys, inputs.values)))
                x, normed = glue.add_norm(x, layer["down"](glue.activate(layer["gate_up"](normed))))
            return x

        return run


class Inputs:
    """Activations of ``m`` sequences and the caches of one layer, which stand for those of all.

    Between two uses a layer's weights pass, so that caches come from memory as those of 32 layers would.
    """

    def __init__(self, shape: StackShape, m: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(24)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

        self.x = normal(m, shape.hidden)
        self.query = normal(m, shape.heads, shape.head_dim)
        self.keys = normal(m, shape.kv_heads, shape.context, shape.head_dim)
        self.values = normal(m, shape.kv_heads, shape.context, shape.head_dim)
        # Where the new token's go.
        self.slots = (self.keys[:, :, -1], self.values[:, :, -1])
        steps = torch.arange(shape.head_dim // 2, device=device) / (shape.head_dim // 2)
        angles = (shape.context - 1) * 500000.0**-steps
        self.angles = (angles.cos(), torch.stack([-angles.sin(), angles.sin()]))


def measure(
    stacks: Stacks, tokens: Sequence[int], timer: Timer, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compare, then time all ways in turns; attention is the fastest of :mod:`bench.decode_glue` for all.

    Raises:
        NumericsError: a backend's outputs are not the dense ones up to rounding.
    """
    rows = []
    for m in tokens:
        inputs = Inputs(stacks.shape, m, stacks.device)
        ways = stacks.glue.attentions
        chosen, times = fastest_attention(ways, inputs.query, inputs.keys, inputs.values, timer)
        progress(f"m={m}: attention by {chosen}; " + ", ".join(f"{n} {us:.1f} us" for n, us in times.items()))
        steps = {way: stacks.step(way, inputs, ways[chosen]) for way in stacks.linears}
        expected = steps["dense"]().float()
        distances = {}
        for way, step in steps.items():
            distance = float((step().float() - expected).abs().mean() / expected.abs().mean())
            if not distance <= _LIMIT:
                raise NumericsError(f"{way}, {m} tokens: outputs are {distance:.3g} of their size off dense")
            distances[way] = distance
        timings = timer({way: [step] for way, step in steps.items()})
        for way, timing in timings.items():
            row = {
                "backend": way,
                "m": m,
                "us": timing.median,
                "us_best": timing.best,
                "ratio_vs_dense": timings["dense"].median / timing.median,
                "weight_gbs": stacks.weight_bytes[way] / timing.median / 1e3,
                "distance": distances[way],
                "attention": chosen,
            }
            rows.append(row)
            progress(
                f"{way:<11} m={m:<4} {timing.median:>9.1f} us  x{row['ratio_vs_dense']:.3f} of dense  "
                f"{row['weight_gbs']:>6.0f} GB/s of weights  distance {distances[way]:.1e}"
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["triton"])
    parser.add_argument("--format", default="bf16", choices=list(FORMATS))
    parser.add_argument("--m", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--layers", type=int, default=LLAMA_8B.layers)
    parser.add_argument("--json", type=Path, help="write the figures here")
    chosen = parser.parse_args(arguments)
    say = line_writer(sys.stderr if chosen.json == STANDARD_OUTPUT else sys.stdout)

    try:
        check_writable(chosen.json)
        if not torch.cuda.is_available():
            raise UnsupportedError("no NVIDIA GPU that torch can use; the decode step is timed on one")
        shape = StackShape(**{**asdict(LLAMA_8B), "layers": chosen.layers})
        stacks = Stacks(shape, chosen.format, chosen.backends, torch.device("cuda"))
        rows = measure(stacks, chosen.m, time_together, say)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    document = {"schema": SCHEMA, "shape": asdict(shape), "format": chosen.format, "rows": rows}
    write_document({**document, "environment": describe()}, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
