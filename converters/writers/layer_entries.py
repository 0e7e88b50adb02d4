"""``per_layer_config`` of the layers a structured writer keeps, in the family's own key names."""

from collections.abc import Mapping, Sequence
from typing import Any

from converters.readers.structure import LayerFound
from converters.writers.align import Growth
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.models.families import Family
from vllm_sparse.models.layer_config import DOWN_PROJ_BIAS, O_PROJ_BIAS, SHARED_WIDTH

# What a source's per_layer_config says beside sizes, which the tensors decide.
_TOP_K = "num_experts_per_tok"
_CARRIED = (_TOP_K, "attention_bias", "mlp_bias")


class LayerEntries:
    """Global values and per-layer entries that describe the layers.

    Args:
        family: key names.
        layers: those that stay, in their new order.
        growth: channels that alignment adds, by the layer's number in the source.
    """

    def __init__(self, family: Family, layers: Sequence[LayerFound], growth: Mapping[int, Growth]) -> None:
        self._family = family
        self._layers = layers
        self._growth = growth
        self._values = [self._sizes(layer) for layer in layers]

    def _sizes(self, layer: LayerFound) -> dict[str, int]:
        """Sizes of a layer under their keys; what it lacks is left out."""
        family, growth = self._family, self._growth.get(layer.index)
        extra = growth.count if growth else 0
        sizes = {family.heads_keys[0]: layer.heads}
        if family.kv_heads_key:
            sizes[family.kv_heads_key] = layer.kv_heads
        if layer.experts is not None:
            sizes[family.experts_keys[0]] = len(layer.experts.ids)
            sizes[family.expert_width_key or ""] = layer.experts.width + extra
            if layer.experts.shared_width:
                sizes[SHARED_WIDTH] = layer.experts.shared_width
        elif family.ffn_key and layer.width:
            sizes[family.ffn_key] = layer.width + extra
        return {key: size for key, size in sizes.items() if size}

    def complete(self, config: dict[str, Any]) -> None:
        """Set the global values: those missing, those of a uniform model, which layers hold experts."""
        self._set_expert_layers(config)
        for key in dict.fromkeys(key for sizes in self._values for key in sizes):
            found = [sizes[key] for sizes in self._values if key in sizes]
            default = self._usual_shared_width(config) if key == SHARED_WIDTH else None
            if config.get(key) is None and set(found) != {default}:
                config[key] = max(found)
        self._set_uniform(config)

    @staticmethod
    def _usual_shared_width(config: Mapping[str, Any]) -> int | None:
        count, width = config.get("n_shared_experts"), config.get("moe_intermediate_size")
        return count * width if type(count) is int and type(width) is int else None

    def _set_uniform(self, config: dict[str, Any]) -> None:
        """Layers that are all alike are an ordinary model, whatever widths config.json gave."""
        if any(sizes != self._values[0] for sizes in self._values):
            return
        sizes, heads = self._values[0], self._family.heads_keys[0]
        whole = heads in sizes and len(sizes) > 1 + bool(self._family.kv_heads_key)
        # Stock classes of experts take the shared width from the routed one.
        if whole and config["hidden_size"] % sizes[heads] == 0 and SHARED_WIDTH not in config:
            config |= {key: value for key, value in sizes.items() if key != SHARED_WIDTH}

    def _set_expert_layers(self, config: dict[str, Any]) -> None:
        """Say again which layers hold experts: their numbers may have changed."""
        if not self._family.experts_keys or not self._family.ffn_key:
            return
        dense = [i for i, layer in enumerate(self._layers) if layer.has_ffn and layer.experts is None]
        if not self._family.shared_experts:
            config |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
            return
        first = next(
            (i for i, layer in enumerate(self._layers) if layer.experts is not None), len(self._layers)
        )
        if any(index > first for index in dense):
            raise UnsupportedError(
                f"layer {self._layers[first].index} holds experts and a later one is dense; "
                f"{self._family.model_type} models have their dense layers first"
            )
        config |= {"first_k_dense_replace": first, "moe_layer_freq": 1}

    def entries(
        self, config: Mapping[str, Any], source: Mapping[str, Any], top_k: Mapping[int, int]
    ) -> dict[str, dict[str, Any]]:
        """What each layer does not share with the global values.

        Args:
            config: the new global values.
            source: the source's config, whose own entries say what tensors cannot.
            top_k: experts a token takes, by the source's layer, where another schema says it.
        """
        said = {int(key): entry for key, entry in (source.get("per_layer_config") or {}).items()}
        made = {}
        for position, (layer, sizes) in enumerate(zip(self._layers, self._values, strict=True)):
            entry: dict[str, Any] = {
                key: size for key, size in sizes.items() if config.get(key) not in (None, size)
            }
            if layer.experts is not None and top_k.get(layer.index) not in (None, config.get(_TOP_K)):
                entry[_TOP_K] = top_k[layer.index]
            own = said.get(layer.index, {})
            entry |= {key: own[key] for key in _CARRIED if key in own}
            if layer.o_bias and not config.get(O_PROJ_BIAS):
                entry[O_PROJ_BIAS] = True
            if layer.down_bias and not config.get(DOWN_PROJ_BIAS):
                entry[DOWN_PROJ_BIAS] = True
            skip = [word for word, there in (("attention", layer.heads), ("mlp", layer.has_ffn)) if not there]
            if skip:
                entry["skip"] = skip
            if entry:
                made[str(position)] = entry
        return made
