"""Writer of structurally pruned models: plain safetensors with Hugging Face's ``per_layer_config``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from converters.checkpoint import Checkpoint
from converters.config_json import without_compression
from converters.readers.base import Loaded
from converters.readers.structure import (
    LAYER,
    LayerFound,
    check_declared,
    declared_layers,
    family_of,
    found_layers,
    head_dim_of,
)
from converters.safetensors_io import TensorSpec
from converters.writers.base import Decision
from converters.writers.dense import DenseWriter
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
# Tensors that belong to a block and go when it goes.
_ATTENTION = ("self_attn.", "input_layernorm.")
_FFN = ("mlp.", "post_attention_layernorm.")


class StructuredWriter(DenseWriter):
    """Renumbers layers that were dropped whole and records each other layer's shape.

    Args:
        checkpoint: the source; its headers decide every shape.

    Raises:
        FormatError: tensors and config.json disagree.
        UnsupportedError: a model family or block that is not served.
    """

    format = "structured"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.config)
        self._source = checkpoint
        self._family = family_of(checkpoint.config)
        found = found_layers(checkpoint.tensors, checkpoint.config)
        schemas = declared_layers(checkpoint.config)
        for name, declared in schemas:
            check_declared(name, declared, found)
        self.schema = " and ".join(name for name, _ in schemas) or "shapes of the tensors"
        self._check_count(found, bool(schemas))
        self.layers = [layer for layer in found if layer.heads or layer.width]
        self._numbers = {layer.index: position for position, layer in enumerate(self.layers)}
        self._by_index = {layer.index: layer for layer in self.layers}

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

    def new_name(self, name: str) -> str | None:
        """A tensor's name after renumbering; None when its block is gone."""
        match = LAYER.match(name)
        if match is None:
            return name
        layer = self._by_index.get(int(match[1]))
        if layer is None:
            return None
        if (not layer.heads and match[2].startswith(_ATTENTION)) or (
            not layer.width and match[2].startswith(_FFN)
        ):
            return None
        return f"model.layers.{self._numbers[layer.index]}.{match[2]}"

    def specs(self, decision: Decision) -> list[TensorSpec]:
        """See :class:`~converters.writers.base.Writer`."""
        renamed = ((self.new_name(spec.name), spec) for spec in super().specs(decision))
        return [replace(spec, name=name) for name, spec in renamed if name is not None]

    def encode(self, decision: Decision, loaded: Loaded) -> dict[str, Tensor]:
        """See :class:`~converters.writers.base.Writer`."""
        renamed = ((self.new_name(name), value) for name, value in super().encode(decision, loaded).items())
        return {name: value for name, value in renamed if name is not None}

    def config(self, source: Mapping[str, Any], decisions: Sequence[Decision]) -> dict[str, Any]:
        """The new config.json, checked with the plugin's own parser against the tensors to be written."""
        config = {key: value for key, value in without_compression(source).items() if key not in _REPLACED}
        config |= {"model_type": self._family.model_type, "head_dim": head_dim_of(source)}
        config["num_hidden_layers"] = len(self.layers)
        self._cut_layer_lists(config, source["num_hidden_layers"])
        for key, own in (
            ("num_attention_heads", "heads"),
            ("num_key_value_heads", "kv_heads"),
            ("intermediate_size", "width"),
        ):
            if config.get(key) is None:
                config[key] = max(getattr(layer, own) for layer in self.layers)
        self._set_uniform(config)
        self._set_biases(config)
        entries = {
            str(position): entry
            for position, entry in enumerate(map(self._entry(config), self.layers))
            if entry
        }
        config.pop("per_layer_config", None)
        config.pop(ACCESS_FLAG, None)
        extra_biases = any(config.get(key) for key in (O_PROJ_BIAS, DOWN_PROJ_BIAS))
        config["architectures"] = [self._family.stock_architecture]
        if entries or extra_biases:
            config["architectures"] = [self._family.architecture]
            config |= {"per_layer_config": entries, ACCESS_FLAG: True}
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

    def _set_uniform(self, config: dict[str, Any]) -> None:
        """Layers that are all alike are an ordinary model, whatever width config.json gave."""
        shapes = {(layer.heads, layer.kv_heads, layer.width) for layer in self.layers}
        if len(shapes) > 1:
            return
        heads, kv_heads, width = shapes.pop()
        if heads and width and config["hidden_size"] % heads == 0:
            config |= {
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "intermediate_size": width,
            }

    def _set_biases(self, config: dict[str, Any]) -> None:
        """Biases that pruning added, globally where every layer has them."""
        for key, own, block in ((O_PROJ_BIAS, "o_bias", "heads"), (DOWN_PROJ_BIAS, "down_bias", "width")):
            having = [getattr(layer, own) for layer in self.layers if getattr(layer, block)]
            if any(having):
                # Transformers wants a global value for every key that some layers set.
                config[key] = all(having)

    @staticmethod
    def _entry(config: Mapping[str, Any]) -> Any:
        def entry(layer: LayerFound) -> dict[str, Any]:
            found: dict[str, Any] = {
                "num_attention_heads": layer.heads,
                "num_key_value_heads": layer.kv_heads,
                "intermediate_size": layer.width,
            }
            result = {key: value for key, value in found.items() if value not in (0, config[key])}
            if layer.o_bias and not config.get(O_PROJ_BIAS):
                result[O_PROJ_BIAS] = True
            if layer.down_bias and not config.get(DOWN_PROJ_BIAS):
                result[DOWN_PROJ_BIAS] = True
            skip = [word for word, there in (("attention", layer.heads), ("mlp", layer.width)) if not there]
            return result | ({"skip": skip} if skip else {})

        return entry
