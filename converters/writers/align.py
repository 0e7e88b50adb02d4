"""Rounding widths up to multiples that kernels and tensor-parallel ranks like (``convert --align N``).

The added channels are zero, which changes no output, or the best of those that pruning removed, where the
unpruned model is at hand and the pruned one still holds its channels unchanged. A channel's score is the
joint L2 norm of its rows of gate and up and its column of down, as ``structured-ffn`` has it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.readers.structure import LayerFound
from converters.train.structured_ffn import channel_scores
from vllm_sparse.errors import FormatError, UserError

LARGEST = 4096


@dataclass(frozen=True)
class Growth:
    """Channels that a feed-forward block gains.

    Attributes:
        count: how many.
        kept_again: numbers in the unpruned model of those that come back; the others are zeros.
        dense: the unpruned model.
        dense_layer: the layer's number there.
    """

    count: int
    kept_again: tuple[int, ...] = ()
    dense: Checkpoint | None = field(default=None, repr=False)
    dense_layer: int = 0

    def channels(self, name: str, tensor: Tensor, dim: int) -> Tensor:
        """The added rows (``dim`` 0) or columns (1) of tensor ``name``, which is inside its layer."""
        shape = list(tensor.shape)
        shape[dim] = self.count - len(self.kept_again)
        zeros = tensor.new_zeros(shape)
        if self.dense is None:
            return zeros
        whole = self.dense.read(f"model.layers.{self.dense_layer}.{name}")
        again = whole.index_select(dim, torch.tensor(self.kept_again, dtype=torch.int64))
        return torch.cat([again.to(tensor.dtype), zeros], dim)

    def __str__(self) -> str:
        zeros = self.count - len(self.kept_again)
        parts = [f"the best {len(self.kept_again)} removed channels"] if self.kept_again else []
        return " and ".join([*parts, *([f"{zeros} zero channels"] if zeros else [])])


def check_align(align: int, dense: bool) -> None:
    """Refuse impossible options.

    Raises:
        UserError: not a multiple, or an unpruned model without one.
    """
    if not 0 <= align <= LARGEST:
        raise UserError(f"--align {align}: a number of channels from 1 to {LARGEST} is needed")
    if dense and not align:
        raise UserError("--dense gives the channels that --align N re-admits; add --align")


def plan_growth(
    layers: Sequence[LayerFound], align: int, source: Checkpoint, dense: Checkpoint | None
) -> dict[int, Growth]:
    """Channels each layer gains so that its width becomes a multiple of ``align``.

    Args:
        layers: of the pruned model; experts of one layer count from the widest.
        align: the multiple; 0 leaves every width.
        source: the pruned model.
        dense: the unpruned model, whose channels are re-admitted; None pads with zeros.

    Returns:
        Layer number in the source -> its growth; layers that need none are left out.

    Raises:
        FormatError: the unpruned model does not hold the pruned one's channels.
    """
    found: dict[int, Growth] = {}
    matcher = _Matcher(source, dense) if dense else None
    for layer in layers if align else ():
        width = layer.experts.width if layer.experts else layer.width
        missing = -width % align
        if not missing:
            continue
        zeros = matcher is None or layer.experts is not None
        found[layer.index] = Growth(missing) if matcher is None or zeros else matcher.growth(layer, missing)
    return found


class _Matcher:
    """Finds a pruned layer's channels in the unpruned model.

    Args:
        source: the pruned model.
        dense: the unpruned one.
    """

    def __init__(self, source: Checkpoint, dense: Checkpoint) -> None:
        self._source = source
        self._dense = dense
        count = dense.config.get("num_hidden_layers")
        if type(count) is not int or dense.config.get("hidden_size") != source.config.get("hidden_size"):
            raise FormatError(
                f"--dense {dense.path} is not the unpruned model: its config.json is of another size"
            )
        names = [
            f"model.layers.{i}.mlp.{part}_proj.weight"
            for i in range(count)
            for part in ("gate", "up", "down")
        ]
        absent = next((name for name in names if name not in dense.tensors), None)
        if absent:
            raise FormatError(
                f"--dense {dense.path} has no {absent}; give the unpruned model, not compressed"
            )
        self._count = count
        self._next = 0

    def growth(self, layer: LayerFound, missing: int) -> Growth:
        """The best removed channels of a layer, as many as there are; zeros fill the rest."""
        if layer.down_bias:
            raise FormatError(
                f"layer {layer.index} has a bias that stands for its removed channels (FLAP); with them back "
                "it would count them twice. Leave --dense out: zero padding is exact."
            )
        gate = self._source.read(f"model.layers.{layer.index}.mlp.gate_proj.weight")
        number, kept = self._locate(layer, gate)
        parts = (
            self._dense.read(f"model.layers.{number}.mlp.{part}_proj.weight")
            for part in ("gate", "up", "down")
        )
        scores = channel_scores(*parts)
        scores[list(kept)] = -1.0
        best = scores.topk(min(missing, len(scores) - len(kept))).indices.sort().values.tolist()
        return Growth(missing, tuple(best), self._dense, number)

    def _locate(self, layer: LayerFound, gate: Tensor) -> tuple[int, list[int]]:
        """The layer's number in the unpruned model (later than the last one's), and its channels there."""
        for number in range(self._next, self._count):
            whole = self._dense.read(f"model.layers.{number}.mlp.gate_proj.weight").to(gate.dtype)
            kept = _rows_within(gate, whole)
            if kept is not None:
                self._next = number + 1
                return number, kept
        raise FormatError(
            f"layer {layer.index}: its gate_proj is no selection of rows of any layer of "
            f"{self._dense.path}. It was trained after pruning, or is another model's; leave --dense "
            "out: zero padding is exact."
        )


def _rows_within(rows: Tensor, whole: Tensor) -> list[int] | None:
    """Indices of ``rows`` among the rows of ``whole``, each used once; None when one is not there."""
    places: defaultdict[bytes, list[int]] = defaultdict(list)
    for index, key in enumerate(_row_bytes(whole)):
        places[key].append(index)
    found = []
    for key in _row_bytes(rows):
        if not places[key]:
            return None
        found.append(places[key].pop(0))
    return found


def _row_bytes(matrix: Tensor) -> list[bytes]:
    flat = matrix.contiguous().view(torch.uint8).reshape(len(matrix), -1).numpy()
    return [row.tobytes() for row in flat]
