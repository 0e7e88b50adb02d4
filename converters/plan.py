"""Deciding, before anything is written, what every tensor becomes and in which shard it goes."""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from converters.layers import Kind, fusion_group
from converters.readers.base import Entry, Loaded, Reader
from converters.safetensors_io import TensorSpec, file_order
from converters.writers.base import Decision, Writer
from vllm_sparse.errors import FormatError, NumericsError
from vllm_sparse.sparse24.scan import count_24

# Entries checked, and shards written, at a time: while one waits for the disk, a lock of the
# file system or the interpreter, the other uses the processor.
AT_A_TIME = 2
Tick = Callable[[int], None]
# What the kernels' formats can hold; int4 is held as int8 here.
PACKABLE = (torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class ShardPlan:
    """One output file.

    Attributes:
        name: its file name.
        decisions: the entries that go into it.
        specs: its tensors in file order.
    """

    name: str
    decisions: tuple[Decision, ...]
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        decisions: every entry, in source order.
        shards: the output files.
        config: the new config.json.
    """

    decisions: tuple[Decision, ...]
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(shard.nbytes for shard in self.shards)

    def index(self) -> dict[str, Any]:
        """``model.safetensors.index.json``."""
        names = {spec.name: shard.name for shard in self.shards for spec in shard.specs}
        return {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(names.items()))}


def validate_and_decide(reader: Reader, pack: bool, tick: Tick) -> list[Decision]:
    """Read every entry once, check it, and decide which linears are packed as 2:4.

    Args:
        reader: the source.
        pack: pack 2:4 linears; otherwise everything is written dense.
        tick: told the bytes of each entry as it is done.

    Raises:
        FormatError: broken input, or a layer that is not 2:4 although its config says so.
        NumericsError: NaN or Inf.
    """

    def check(entry: Entry) -> Decision:
        loaded = reader.load(entry)
        return _decide(entry, loaded) if pack else Decision(entry, False, zeros=_zeros(entry, loaded))

    decisions = []
    with ThreadPoolExecutor(AT_A_TIME) as workers:
        # In order, and the first error of the file, whichever thread is faster.
        waiting: deque[Future[Decision]] = deque()
        try:
            for entry in reader.entries():
                waiting.append(workers.submit(check, entry))
                if len(waiting) > AT_A_TIME:
                    decisions.append(_next(waiting, tick))
            while waiting:
                decisions.append(_next(waiting, tick))
        finally:
            for future in waiting:
                future.cancel()
    return agree_within_fused(decisions) if pack else decisions


def _next(waiting: deque[Future[Decision]], tick: Tick) -> Decision:
    decision = waiting.popleft().result()
    tick(decision.entry.numel * decision.entry.dtype.itemsize)
    return decision


def _zeros(entry: Entry, loaded: Loaded) -> int:
    return count_24(loaded.weight)[0] if entry.kind is Kind.LINEAR and entry.shape[1] % 4 == 0 else 0


def _decide(entry: Entry, loaded: Loaded) -> Decision:
    if entry.kind is not Kind.LINEAR:
        return Decision(entry, False)
    if not entry.numel:
        return Decision(entry, False, "it is empty")
    cols = entry.shape[1]
    if cols % 4:
        if entry.claims_24:
            raise FormatError(
                f"{entry.name} is {list(entry.shape)} and the config says 2:4, but its input width {cols} is "
                "not a "
                "multiple of 4. Add the layer to sparsity_config.ignore, or pass --format dense."
            )
        return Decision(entry, False, f"input width {cols} is not a multiple of 4")
    zeros, crowded = count_24(loaded.weight)
    if crowded:
        if entry.claims_24:
            raise NumericsError(
                f"{entry.name} is not 2:4 although the config says so: {crowded} of {entry.numel // 4} "
                "groups of "
                "4 hold more than 2 non-zeros. Prune it first (vllm-sparse compress), add it to "
                "sparsity_config.ignore, or pass --format dense to go by the data alone."
            )
        return Decision(entry, False, "not 2:4", zeros)
    if entry.dtype not in PACKABLE:
        return Decision(entry, False, f"{entry.dtype} cannot be packed", zeros)
    if cols % 8:
        return Decision(entry, False, f"input width {cols} is not a multiple of 8", zeros)
    return Decision(entry, True, "", zeros)


def agree_within_fused(decisions: Sequence[Decision]) -> list[Decision]:
    """Leave a linear dense when one that vLLM fuses it with is dense: they are one matrix there."""
    groups: defaultdict[str, list[Decision]] = defaultdict(list)
    for decision in decisions:
        if decision.entry.kind is Kind.LINEAR:
            groups[fusion_group(decision.entry.module)].append(decision)
    blocker: dict[str, str] = {}
    for key, members in groups.items():
        dense = [item.entry.module for item in members if not item.pack]
        if dense and len(dense) < len(members):
            blocker[key] = dense[0]
    result = []
    for decision in decisions:
        key = fusion_group(decision.entry.module)
        if decision.pack and key in blocker:
            reason = f"vLLM fuses it with {blocker[key]}, which is dense"
            decision = Decision(decision.entry, False, reason, decision.zeros)
        result.append(decision)
    return result


def make_plan(decisions: Sequence[Decision], writer: Writer, config: Mapping[str, Any]) -> Plan:
    """Lay the decided entries out in shards, one for each source shard that has any.

    Raises:
        FormatError: two entries would write the same tensor.
    """
    by_shard: defaultdict[str, list[Decision]] = defaultdict(list)
    for decision in decisions:
        by_shard[decision.entry.shard].append(decision)
    filled = [
        (group, [spec for decision in group for spec in writer.specs(decision)])
        for group in by_shard.values()
    ]
    filled = [(group, specs) for group, specs in filled if specs]
    shards = []
    seen: set[str] = set()
    for position, (group, specs) in enumerate(filled, 1):
        twice = [spec.name for spec in specs if spec.name in seen]
        seen.update(spec.name for spec in specs)
        if twice or len({spec.name for spec in specs}) < len(specs):
            raise FormatError(f"two source tensors would both become {(twice or [specs[0].name])[0]!r}")
        name = (
            "model.safetensors"
            if len(filled) == 1
            else f"model-{position:05d}-of-{len(filled):05d}.safetensors"
        )
        shards.append(ShardPlan(name, tuple(group), tuple(file_order(specs))))
    return Plan(tuple(decisions), tuple(shards), writer.config(config, decisions))


def peak_bytes(plan: Plan) -> int:
    """An upper estimate of the memory the weights take while converting.

    The largest entry is held as read, unpacked or quantised in float32, and as written, once for each that
    is worked on at a time.
    """
    largest = 0
    for shard in plan.shards:
        for decision in shard.decisions:
            entry = decision.entry
            wide = 4 if decision.pack and entry.quantized is None else entry.dtype.itemsize
            largest = max(largest, entry.numel * (2 * entry.dtype.itemsize + 2 * wide))
    return AT_A_TIME * largest
