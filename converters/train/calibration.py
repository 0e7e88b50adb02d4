"""Layer-by-layer calibration: what a layer's linears see, and propagation of pruned outputs.

One-shot methods visit decoder layers in order. A layer is run on the calibration sequences as the layers
before it, already pruned, left them; statistics of its linears' inputs are collected; the layer is
pruned; and it is run again, so that the next layer sees the pruned layer's output (SparseGPT,
arXiv:2301.00774; Wanda, arXiv:2306.11695).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from converters.train.progress import RunProgress
from vllm_sparse.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Statistic(Protocol):
    """Something accumulated over a linear's inputs."""

    def add(self, inputs: Tensor) -> None:
        """Take in float32 inputs ``[tokens, in_features]``."""


class InputNorm:
    """Sum of squares of each input feature: ``||X_j||^2``, float32 ``[in_features]``."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum_squares = torch.zeros(in_features, device=device)

    def add(self, inputs: Tensor) -> None:
        """Accumulate ``[tokens, in_features]``."""
        self.sum_squares += inputs.square().sum(0)


class InputHessian:
    """``H = (2/N) sum x x^T`` over N tokens, float32 ``[in_features, in_features]``."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Accumulate ``[tokens, in_features]``."""
        self._sum.addmm_(inputs.T, inputs)
        self._tokens += inputs.shape[0]

    @property
    def hessian(self) -> Tensor:
        """The Hessian of the layer's squared output error, per output row."""
        return self._sum * (2.0 / max(1, self._tokens))


StatisticFactory = Callable[[int, torch.device], Statistic]
LayerVisitor = Callable[[int, nn.Module, Mapping[str, Any]], None]


def decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        UnsupportedError: a family whose layers are not ``model.layers`` made of ``nn.Linear``.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not linears_of(layers[0]):
        raise UnsupportedError(
            f"{type(model).__name__} is not a decoder of linear layers that this method knows; "
            "Llama, Mistral, Qwen2 and Qwen3 are"
        )
    if any("experts" in name for name, _ in layers.named_modules()):
        raise UnsupportedError(
            f"{type(model).__name__} is a mixture of experts; this method works on dense models. "
            "Experts of Qwen3-MoE are pruned by reap, heapr, camera-p and ddp"
        )
    return layers


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """Linears of one layer by their name inside it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


@dataclass
class LayerInputs:
    """Hidden states before a layer and the arguments that each layer is called with.

    Attributes:
        hidden: ``[samples, sequence, hidden]``, updated in place as layers are passed.
        arguments: by layer, keyword arguments for a batch of any size (positions, masks). Layers differ in
            them where some attend to a window only.
    """

    hidden: Tensor
    arguments: list[dict[str, Any]]

    def call(self, index: int, layer: nn.Module, rows: slice) -> Tensor:
        """The output of layer ``index`` for some of the samples."""
        output = layer(self.hidden[rows], **self.arguments[index])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def run(self, index: int, layer: nn.Module, batch_size: int, keep: bool) -> None:
        """Run layer ``index`` over all samples; with ``keep`` its outputs replace the hidden states."""
        for start in range(0, self.hidden.shape[0], batch_size):
            rows = slice(start, start + batch_size)
            output = self.call(index, layer, rows)
            if keep:
                self.hidden[rows] = output


class _Recorder(nn.Module):
    """Stands for a layer and remembers what it was last called with; passes the states on unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states


@torch.no_grad()
def first_layer_inputs(model: "PreTrainedModel", sequences: Tensor) -> LayerInputs:
    """What the first decoder layer sees for ``sequences`` ``[samples, sequence]``."""
    decoder: Any = model.model
    layers = decoder.layers
    recorders = [_Recorder() for _ in layers]
    hidden = []
    device = next(model.parameters()).device
    decoder.layers = nn.ModuleList(recorders)
    try:
        # One sample a call: arguments recorded for a batch of one broadcast to any batch.
        for sample in sequences.split(1):
            decoder(input_ids=sample.long().to(device), use_cache=False)
            hidden.append(recorders[0].hidden)
    finally:
        decoder.layers = layers
    return LayerInputs(torch.cat(hidden), [recorder.arguments for recorder in recorders])


@torch.no_grad()
def sweep_layers(
    model: "PreTrainedModel",
    sequences: Tensor,
    statistic: StatisticFactory,
    visit: LayerVisitor,
    batch_tokens: int = 4096,
    title: str = "pruning",
    quiet: bool = False,
) -> None:
    """Collect statistics of each layer's linears, let ``visit`` prune it, pass its outputs on.

    Args:
        model: in eval mode; changed by ``visit``.
        sequences: token ids ``[samples, sequence]``.
        statistic: makes an empty statistic for an input width; linears that share their input (q, k
            and v; gate and up) share one.
        visit: called as ``visit(layer index, layer, {linear name: statistic})``.
        batch_tokens: tokens a forward, rounded down to whole sequences.
        title: for the progress display.
        quiet: no progress display.
    """
    layers = decoder_layers(model)
    inputs = first_layer_inputs(model, sequences)
    batch_size = max(1, batch_tokens // sequences.shape[1])
    with RunProgress(title, len(layers), quiet=quiet) as progress:
        for index, layer in enumerate(layers):
            visit(index, layer, _collect(index, layer, inputs, statistic, batch_size))
            inputs.run(index, layer, batch_size, keep=True)
            progress.update(index + 1)


def _collect(
    index: int, layer: nn.Module, inputs: LayerInputs, factory: StatisticFactory, batch_size: int
) -> dict[str, Statistic]:
    linears = linears_of(layer)
    owners = _input_owners(index, layer, linears, inputs)
    statistics = {
        name: factory(linears[name].in_features, inputs.hidden.device) for name in set(owners.values())
    }

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: statistics[name].add(args[0].flatten(0, -2).float())

    handles = [linears[name].register_forward_pre_hook(hook(name)) for name in statistics]
    try:
        inputs.run(index, layer, batch_size, keep=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: statistics[owner] for name, owner in owners.items()}


def _input_owners(
    index: int, layer: nn.Module, linears: dict[str, nn.Linear], inputs: LayerInputs
) -> dict[str, str]:
    """For each linear the first one that is given the same tensor."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: seen.__setitem__(name, args[0])

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        inputs.call(index, layer, slice(1))
    finally:
        for handle in handles:
            handle.remove()
    # All inputs are alive in `seen`, so equal addresses mean the same tensor.
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in seen.items()}
