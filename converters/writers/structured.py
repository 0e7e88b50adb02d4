"""Writer of structurally pruned models: plain safetensors with Hugging Face's ``per_layer_config``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.config_json import without_compression
from converters.readers.base import Loaded
from converters.readers.declared import check_declared, declared_layers, group_sizes
from converters.readers.structure import LAYER, LayerFound, family_of, found_layers, head_dim_of
from converters.safetensors_io import TensorSpec
from converters.writers.align import plan_growth
from converters.writers.base import Decision
from converters.writers.dense import DenseWriter
from converters.writers.edits import Edit, Shape, edit_inside
from converters.writers.layer_entries import LayerEntries
from vllm_sparse.errors import FormatError
from vllm_sparse.models.layer_config import ACCESS_FLAG, DOWN_PROJ_BIAS, O_PROJ_BIAS, read_model_shape
from vllm_sparse.models.tensors import check_tensors

# Foreign descriptions, replaced by per_layer_config; and remote code, which is never carried over.
_REPLACED = (
    "block_configs",
    "layer_head_num",
    "layer_inter_size",
    "anymodel_arch_info",
    "base_architecture",
    "auto_map",
)


class StructuredWriter(DenseWriter):
    """Renumbers layers and experts that were dropped, pads what must be equal, records each layer's shape.

    Args:
        checkpoint: the source; its headers decide every shape.
        align: round feed-forward and expert widths up to multiples of this; 0 leaves them.
        dense: the unpruned model, whose best removed channels then come back; None rounds with zeros.

    Raises:
        FormatError: tensors and config.json disagree.
        UnsupportedError: a model family or block that is not served.
    """

    format = "structured"

    def __init__(self, checkpoint: Checkpoint, align: int = 0, dense: Checkpoint | None = None) -> None:
        super().__init__(checkpoint.config)
        self._source = checkpoint
        self._family = family_of(checkpoint.config)
        self._head_dim = 0 if self._family.latent_attention else head_dim_of(checkpoint.config)
        found = found_layers(checkpoint.tensors, checkpoint.config, group_sizes(checkpoint.config))
        self._predictors = _further_tokens(checkpoint.config, len(found))
        found = found[: len(found) - self._predictors]
        schemas = declared_layers(checkpoint.config)
        for name, declared in schemas:
            check_declared(name, declared, found)
        self._top_k = {i: d.top_k for _, said in schemas for i, d in enumerate(said) if d.top_k is not None}
        self.schema = " and ".join(name for name, _ in schemas) or "shapes of the tensors"
        self._check_count(found, bool(schemas))
        self.layers = [layer for layer in found if layer.heads or layer.has_ffn]
        if not self.layers:
            raise FormatError("no layer of the source has attention or a feed-forward block in plain weights")
        self._numbers = {layer.index: position for position, layer in enumerate(self.layers)}
        self._by_index = {layer.index: layer for layer in self.layers}
        self._align = align
        self._growth = plan_growth(self.layers, align, checkpoint, dense)
        self.notes = (*self._predictor_notes(), *self._padding_notes(), *self._growth_notes())

    def _predictor_notes(self) -> list[str]:
        """What is left out of DeepSeek-V3, where it is there."""
        if not self._predictors:
            return []
        return [f"the last {self._predictors} layers predict further tokens (drafts) and are left out"]

    def _padding_notes(self) -> list[str]:
        """What zero-padding inside layers costs."""
        notes = []
        for layer in self.layers:
            if layer.experts is not None and layer.experts.padding():
                found = layer.experts
                share = 100 * found.padding() / (found.width * len(found.ids))
                notes.append(
                    f"layer {layer.index}: experts {min(found.widths)} to {found.width} wide, padded with "
                    f"zeros to {found.width}, {share:.1f} % of their channels"
                )
            if layer.groups is not None and layer.groups.padded_heads:
                plan = layer.groups
                notes.append(
                    f"layer {layer.index}: {plan.padded_heads} of {plan.num_heads} query heads are zeros, so "
                    f"that each of {plan.num_kv_heads} KV heads serves {plan.group_size}"
                )
        return notes

    def _growth_notes(self) -> list[str]:
        """What ``--align`` costs, in all and by layer."""
        if not self._align:
            return []
        hidden = self._source.config["hidden_size"]
        cost = {i: 3 * hidden * g.count * self._blocks(i) for i, g in self._growth.items()}
        whole = sum(_numel(spec.shape) for spec in self._source.tensors.values())
        total = sum(cost.values())
        notes = [
            f"--align {self._align} adds {total} parameters ({100 * total / max(1, whole):.2f} % of the "
            f"model) to {len(cost)} of {len(self.layers)} layers"
        ]
        for index, growth in self._growth.items():
            layer = self._by_index[index]
            width = layer.experts.width if layer.experts else layer.width
            notes.append(
                f"layer {index}: width {width} to {width + growth.count} with {growth}, "
                f"{cost[index]} parameters"
            )
        return notes

    def _blocks(self, index: int) -> int:
        experts = self._by_index[index].experts
        return len(experts.ids) if experts else 1

    def _check_count(self, found: Sequence[LayerFound], declared: bool) -> None:
        count = self._source.config.get("num_hidden_layers")
        if type(count) is not int or count <= 0:
            raise FormatError(f"config.json: num_hidden_layers is {count!r}")
        if len(found) > count:
            raise FormatError(f"config.json says {count} layers, the weights have {len(found)}")
        if len(found) < count and not declared:
            present = {layer.index for layer in found}
            gone = next(index for index in range(count) if index not in present)
            raise FormatError(
                f"layer {gone} has no tensors and config.json does not say that it was dropped; lower "
                f"num_hidden_layers to {len(found)} if it was, or fetch the missing shard"
            )

    def edit(self, name: str, shape: Shape) -> Edit | None:
        """A tensor's new name, shape and data; None when what it belongs to is gone."""
        match = LAYER.match(name)
        if match is None:
            return Edit(name, shape)
        layer = self._by_index.get(int(match[1]))
        if layer is None:
            return None
        edit = edit_inside(layer, match[2], shape, self._head_dim, self._growth.get(layer.index))
        return edit and replace(edit, name=f"model.layers.{self._numbers[layer.index]}.{edit.name}")

    def specs(self, decision: Decision) -> list[TensorSpec]:
        """See :class:`~converters.writers.base.Writer`."""
        edits = ((spec, self.edit(spec.name, spec.shape)) for spec in super().specs(decision))
        return [replace(spec, name=edit.name, shape=edit.shape) for spec, edit in edits if edit is not None]

    def encode(self, decision: Decision, loaded: Loaded) -> dict[str, Tensor]:
        """See :class:`~converters.writers.base.Writer`."""
        plain = super().encode(decision, loaded)
        edits = ((self.edit(name, tuple(value.shape)), value) for name, value in plain.items())
        return {edit.name: edit.apply(value).contiguous() for edit, value in edits if edit is not None}

    def config(self, source: Mapping[str, Any], decisions: Sequence[Decision]) -> dict[str, Any]:
        """The new config.json, checked with the plugin's own parser against the tensors to be written."""
        config = {key: value for key, value in without_compression(source).items() if key not in _REPLACED}
        config["model_type"] = self._family.model_type
        if self._head_dim:
            config["head_dim"] = self._head_dim
        config["num_hidden_layers"] = len(self.layers)
        if self._family.correction_bias:
            config["num_nextn_predict_layers"] = 0
        self._cut_layer_lists(config, source["num_hidden_layers"])
        entries = LayerEntries(self._family, self.layers, self._growth)
        entries.complete(config)
        self._set_biases(config)
        per_layer = entries.entries(config, source, self._top_k)
        config.pop("per_layer_config", None)
        config.pop(ACCESS_FLAG, None)
        extra_biases = any(config.get(key) for key in (O_PROJ_BIAS, DOWN_PROJ_BIAS))
        config["architectures"] = [self._family.stock_architecture]
        if per_layer or extra_biases:
            config["architectures"] = [self._family.architecture]
            config |= {"per_layer_config": per_layer, ACCESS_FLAG: True}
        written = {spec.name: spec.shape for item in decisions for spec in self.specs(item)}
        check_tensors(read_model_shape(config), written)
        return config

    def _cut_layer_lists(self, config: dict[str, Any], count: int) -> None:
        """Lists with one item per layer lose those of dropped layers."""
        if len(self.layers) == count:
            return
        for key, value in config.items():
            if isinstance(value, list) and len(value) == count and key != "architectures":
                config[key] = [value[layer.index] for layer in self.layers]

    def _set_biases(self, config: dict[str, Any]) -> None:
        """Biases that pruning added, globally where every layer has them."""
        for key, own, block in ((O_PROJ_BIAS, "o_bias", "heads"), (DOWN_PROJ_BIAS, "down_bias", "width")):
            having = [getattr(layer, own) for layer in self.layers if getattr(layer, block)]
            if any(having):
                # Transformers wants a global value for every key that some layers set.
                config[key] = all(having)


def _further_tokens(config: Mapping[str, Any], found: int) -> int:
    """How many of the found layers come after the model's own and draft further tokens (DeepSeek-V3)."""
    count, more = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    return more if type(count) is int and type(more) is int and 0 < more == found - count else 0


def _numel(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
