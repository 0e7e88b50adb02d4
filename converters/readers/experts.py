"""Experts of one layer as its tensors show them: which are left, how wide each is, what the router scores."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.models.families import Family

Shapes = Mapping[str, tuple[int, ...]]
#: Gate, up and down of one expert, by the name of the block that holds the experts.
_PARTS = {"block_sparse_moe": ("w1", "w3", "w2"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_FUSED = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class ExpertsFound:
    """The experts of one layer.

    Attributes:
        block: module that holds them, inside the layer.
        parts: names of an expert's gate, up and down.
        ids: their numbers in the source, ascending; cuts may leave gaps.
        widths: own width of each.
        router_rows: experts that the router still scores; more than ``ids`` before its rows are cut.
        shared_width: width of the experts that every token takes; 0 without.
    """

    block: str
    parts: tuple[str, str, str]
    ids: tuple[int, ...]
    widths: tuple[int, ...]
    router_rows: int
    shared_width: int = 0

    @property
    def width(self) -> int:
        """The one width that fused kernels need: the widest expert's."""
        return max(self.widths)

    @property
    def rows(self) -> tuple[int, ...] | None:
        """Router rows to keep; None keeps all."""
        return self.ids if self.router_rows != len(self.ids) else None

    def padding(self, width: int | None = None) -> int:
        """Zero channels that ``width`` (default: the widest expert's) adds over all experts."""
        return sum((width or self.width) - own for own in self.widths)


def find_experts(where: str, shapes: Shapes, family: Family, hidden: int) -> ExpertsFound | None:
    """Read a layer's experts from its tensors' shapes.

    Args:
        where: the layer, for messages.
        shapes: name inside the layer -> shape.
        family: of the model.
        hidden: width of the residual stream.

    Returns:
        None for a layer without experts.

    Raises:
        FormatError: tensors are missing or contradict each other or the router.
        UnsupportedError: experts stored as one tensor.
    """
    block = "block_sparse_moe" if family.model_type == "mixtral" else "mlp"
    parts = _PARTS[block]
    fused = [name for name in shapes if name.startswith(tuple(f"{block}.{part}" for part in _FUSED))]
    if fused:
        raise UnsupportedError(
            f"{where}: {fused[0]} holds all experts in one tensor; save the model with one tensor an expert"
        )
    pattern = re.compile(rf"^{block}\.experts\.(\d+)\.")
    ids = tuple(sorted({int(match[1]) for name in shapes if (match := pattern.match(name))}))
    if not ids:
        return None
    widths = tuple(
        _expert_width(f"{where}: {block}.experts.{i}", shapes, f"{block}.experts.{i}", parts, hidden)
        for i in ids
    )
    router = shapes.get(f"{block}.gate.weight")
    if router is None or len(router) != 2 or router[1] != hidden:
        raise FormatError(f"{where}: the router {block}.gate.weight is missing or has no {hidden} columns")
    if router[0] != len(ids) and router[0] <= ids[-1]:
        raise FormatError(
            f"{where}: the router scores {router[0]} experts, the layer has {len(ids)} with numbers up to "
            f"{ids[-1]}; cut the router's rows with the experts, or leave both uncut"
        )
    _check_correction(where, shapes, f"{block}.gate.e_score_correction_bias", family, router[0])
    shared = f"{block}.shared_experts"
    shared_width = 0
    if any(name.startswith(f"{shared}.") for name in shapes):
        shared_width = _expert_width(f"{where}: {shared}", shapes, shared, parts, hidden)
    return ExpertsFound(block, parts, ids, widths, router[0], shared_width)


def _check_correction(where: str, shapes: Shapes, name: str, family: Family, rows: int) -> None:
    """The bias that the router's choice adds must be there and as long as the router."""
    found = shapes.get(name)
    if found is None and not family.correction_bias:
        return
    if found is None:
        raise FormatError(f"{where}: {name} is missing; {family.model_type} routers choose by it")
    if found != (rows,):
        raise FormatError(
            f"{where}: {name} has {found[0] if found else 0} numbers, the router scores {rows} experts; cut "
            "the biases with the router's rows, or leave both uncut"
        )


def _expert_width(where: str, shapes: Shapes, module: str, parts: tuple[str, str, str], hidden: int) -> int:
    found = [shapes.get(f"{module}.{part}.weight") for part in parts]
    gate, up, down = found
    if gate is None or up is None or down is None:
        missing = parts[found.index(None)]
        raise FormatError(f"{where} has no {missing}.weight")
    if gate != up or down != gate[::-1] or len(gate) != 2 or gate[1] != hidden or not gate[0]:
        raise FormatError(
            f"{where}: shapes {list(gate)}, {list(up)} and {list(down)} do not fit together with "
            f"hidden_size {hidden}"
        )
    return gate[0]
