"""The quantization config that claims 2:4 checkpoints and leaves all others to vLLM.

vLLM asks every registered method whether it overrides a checkpoint's own one; this one answers for
compressed-tensors checkpoints that carry a ``sparsity_config`` (stock vLLM refuses those). This module is
unpickled in EngineCore before plugins load there, so it must import on its own, and every vLLM command
imports it, so layers and kernels are imported only when a model is built.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.quantization import prepared
from vllm_sparse.quantization.report import LoadReport, logger
from vllm_sparse.quantization.scheme import Schemes, SchemeTable, Sparse24Table, Storage, is_vestigial
from vllm_sparse.quantization.spec import (
    CompressedTensorsSpec,
    QuantFormat,
    normalised_method,
    parse_compressed_tensors,
    parse_sparse24,
)

METHOD_NAME = "sparse24"
# What vLLM puts before the names of a draft model's layers; neither checkpoint nor config has it.
DRAFT_PREFIX = "draft_model."
# What it puts before those of an embedding model, whose checkpoint may be a trunk alone.
TRUNK_PREFIX = "model."
EAGLE_HEAD = re.compile(r"Eagle.*ForCausalLM|.*Eagle3")
# A layer of an EAGLE head, and what its parts are; vLLM tells this of other models alone.
HEAD_LAYER = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<rest>.+)")
FUSED_IN_HEADS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}


class Sparse24Config(QuantizationConfig):
    """Serves 2:4 checkpoints; registered as ``sparse24``.

    Args:
        table: which layers are 2:4 and how; None (``--quantization sparse24`` on a checkpoint without a
            quantisation config) looks for 2:4 in every linear layer's data.
        stock_config: the checkpoint's block without its sparsity_config.
    """

    def __init__(self, table: Schemes | None = None, stock_config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}
        self.table = table
        self.report = LoadReport()
        self._stock_config = stock_config or {}
        self._stock: QuantizationConfig | None = None
        self._mapper: Any = None
        self._knows_names = False
        self._is_eagle_head = False
        self.family: str | None = None

    @property
    def quantises_kv_cache(self) -> bool:
        """Whether the checkpoint has a scheme for the KV cache."""
        return bool(self._stock_config.get("kv_cache_scheme"))

    @property
    def stores_bitmasks(self) -> bool:
        """Whether 2:4 layers lie packed in the checkpoint; otherwise every weight is stored dense."""
        return self.table is not None and self.table.storage is Storage.BITMASK

    @property
    def stock(self) -> QuantizationConfig:
        """vLLM's own config, for layers that are quantised but not 2:4 and for the KV cache.

        Built on first need: it refuses schemes (8-bit weights alone) that the 2:4 layers may well use.
        """
        if self._stock is None:
            self._stock = _stock_from_config(self._stock_config)
            self._stock.packed_modules_mapping = self.packed_modules_mapping
            if self._mapper is not None:
                self._stock.apply_vllm_mapper(self._mapper)
        return self._stock

    def get_name(self) -> str:
        """The name vLLM knows this method by."""
        return METHOD_NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Any float the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere, the first GPU generation with 2:4 tensor cores."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything stands in config.json."""
        return []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim compressed-tensors checkpoints that are, or say they are, sparse."""
        if normalised_method(hf_quant_cfg) != "compressed-tensors":
            return None
        sparsity = hf_quant_cfg.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("targets"):
            return METHOD_NAME
        groups = hf_quant_cfg.get("config_groups") or {}
        formats = [hf_quant_cfg.get("format"), *(group.get("format") for group in groups.values())]
        return METHOD_NAME if QuantFormat.MARLIN_24.value in formats else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Build from the checkpoint's quantization_config.

        Raises:
            FormatError: the config says something outside the format.
            UnsupportedError: it says something that has to be converted first.
        """
        if normalised_method(config) == METHOD_NAME:
            return cls(Sparse24Table(parse_sparse24(config)))
        spec = parse_compressed_tensors(config)
        _report_unknown_fields(spec)
        without_sparsity = {key: value for key, value in config.items() if key != "sparsity_config"}
        if is_vestigial(spec):
            logger.info("sparsity_config describes densely stored weights; vLLM's own path serves them")
            return _stock_from_config(without_sparsity)
        return cls(SchemeTable(spec), without_sparsity)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Note the model's family, and read ``text_config.compression_config``.

        There vLLM finds the method but not what to build it from.

        Raises:
            UnsupportedError: a left-over block there, which only vLLM's own path could serve.
        """
        self.family = prepared.family_of(hf_config)
        architectures = getattr(hf_config, "architectures", None) or []
        self._is_eagle_head = any(EAGLE_HEAD.fullmatch(name) for name in architectures)
        block = getattr(getattr(hf_config, "text_config", None), "compression_config", None)
        if self.table is not None or not isinstance(block, dict) or not block:
            return
        read = self.from_config(block)
        if not isinstance(read, Sparse24Config):
            raise UnsupportedError(
                "text_config.compression_config describes densely stored weights, and vLLM itself does not "
                "read it there; rename it to quantization_config in config.json"
            )
        self.table, self._stock_config = read.table, read._stock_config

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Translate the config's layer names into vLLM's."""
        if self.table is not None:
            map_name = hf_to_vllm_mapper._map_name
            self.table.rename(
                map_name, partial(_checkpoint_names, hf_to_vllm_mapper.orig_to_new_prefix, map_name)
            )
        self._mapper = hf_to_vllm_mapper

    def get_checkpoint_weight_mapper(self) -> Any:
        """What is renamed or dropped before the model's class sees it."""
        mapper = super().get_checkpoint_weight_mapper()
        dropped = prepared.DROPPED.get(self.family or "")
        return mapper if dropped is None else mapper | type(mapper)(orig_to_new_suffix={dropped: None})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """See :func:`vllm_sparse.quantization.methods.method_for`."""
        from vllm_sparse.quantization.methods import method_for

        self._learn_names()
        return method_for(self, layer, prefix.removeprefix(DRAFT_PREFIX))

    def _learn_names(self) -> None:
        """Make known what vLLM calls the layers of a model that is not built as its checkpoint names it."""
        from vllm_sparse.quantization.methods import is_pooling, layers_of_target

        if self._knows_names or self.table is None:
            return
        self._knows_names = True
        if self._is_eagle_head:
            self.table.rename(_unchanged, partial(_head_names, layers_of_target()))
            if not self.packed_modules_mapping:
                self.packed_modules_mapping = dict(FUSED_IN_HEADS)
        elif is_pooling():
            self.table.rename(_unchanged, partial(_trunk_names, self._mapper))


def _checkpoint_names(
    prefixes: Mapping[str, str | None], map_name: Callable[[str], str | None], name: str
) -> list[str]:
    """What a module that vLLM calls ``name`` may be called in the checkpoint."""
    swapped = [
        old + name.removeprefix(new)
        for old, new in prefixes.items()
        if new is not None and name.startswith(new)
    ]
    return [original for original in swapped if map_name(original) == name]


def _unchanged(name: str) -> str:
    return name


def _trunk_names(mapper: Any, name: str) -> list[str]:
    """What a module of an embedding model may be called in the checkpoint."""
    known = [] if mapper is None else _checkpoint_names(mapper.orig_to_new_prefix, mapper._map_name, name)
    return [*known, name.removeprefix(TRUNK_PREFIX)]


def _head_names(first: int, name: str) -> list[str]:
    """What a module of an EAGLE head may be called in the checkpoint; vLLM counts on from ``first``."""
    found = HEAD_LAYER.fullmatch(name)
    if found is None:
        return [name.removeprefix(TRUNK_PREFIX)]
    number, rest = int(found["number"]) - first, found["rest"]
    numbered = f"layers.{number}.{rest}"
    return [numbered, TRUNK_PREFIX + numbered, *([f"midlayer.{rest}"] if number == 0 else [])]


def _stock_from_config(config: dict[str, Any]) -> QuantizationConfig:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    return CompressedTensorsConfig.from_config(config)


def _report_unknown_fields(spec: CompressedTensorsSpec) -> None:
    for where, block in (("quantization_config", spec), ("sparsity_config", spec.sparsity_config)):
        unknown = block.unknown_fields() if block is not None else []
        if unknown:
            logger.info("%s has fields this plugin has no meaning for: %s", where, ", ".join(unknown))
