"""Checks that run inside vLLM, at configuration time, before any weight is read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.models.layer_config import ModelShape, read_model_shape
from vllm_sparse.models.parallel import check_head_dims, check_pipeline, check_tensor_parallel
from vllm_sparse.models.tensors import check_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig, VllmConfig

# Below "vllm" so that vLLM's logging configuration applies to it.
logger = logging.getLogger("vllm.plugins.vllm_sparse")


def model_shape(hf_config: PretrainedConfig) -> ModelShape:
    """Layer shapes of a loaded Hugging Face config; see :func:`read_model_shape`."""
    return read_model_shape(hf_config.to_dict())


def check_model_config(model_config: ModelConfig) -> None:
    """Validate all layers, and the headers of a local checkpoint's tensors against them.

    Raises:
        FormatError: The config or the tensors contradict themselves or each other.
        UnsupportedError: Well-formed, but not something these classes can serve.
    """
    check_folder(model_shape(model_config.hf_config), model_config.model)


def start_building(vllm_config: VllmConfig) -> ModelShape:
    """Repeat the checks in the process that builds the model, and say once what it will build."""
    shape = check_serving(vllm_config)
    logger.info("Structurally pruned model, %s", shape.summary())
    return shape


def share_fused_names(vllm_config: VllmConfig, names: dict[str, list[str]]) -> None:
    """Tell the quantisation config which linears this model runs as one, before any is built.

    vLLM tells it what the class says; a model whose fused linears depend on its config says so itself.
    """
    if vllm_config.quant_config is not None:
        vllm_config.quant_config.packed_modules_mapping = names


def check_serving(vllm_config: VllmConfig) -> ModelShape:
    """Validate all layers against the way the model is to be served.

    Returns:
        The validated shapes.

    Raises:
        FormatError: The config contradicts itself.
        UnsupportedError: The shapes do not fit the ranks, the stages, the attention kernels, or an
            option that assumes equal layers is on.
    """
    shape = model_shape(vllm_config.model_config.hf_config)
    parallel = vllm_config.parallel_config
    check_tensor_parallel(shape, parallel.tensor_parallel_size, parallel.enable_expert_parallel)
    check_pipeline(shape, _stages(len(shape.layers), parallel.pipeline_parallel_size))
    _check_cpu(shape, vllm_config)
    _check_float16(vllm_config)
    _refuse_equal_layer_features(shape, vllm_config)
    return shape


def _stages(num_layers: int, stages: int) -> list[tuple[int, int]]:
    from vllm.distributed.utils import get_pp_indices

    return [get_pp_indices(num_layers, rank, stages) for rank in range(stages)]


def _check_cpu(shape: ModelShape, vllm_config: VllmConfig) -> None:
    """Refuse what vLLM's CPU kernels lack; other platforms choose their kernels later."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if shape.family.latent_attention and vllm_config.model_config.use_mla:
        from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

        sizes = CPUMLABackend.get_supported_head_sizes()
        check_head_dims(shape, sizes, "vLLM's CPU latent attention (kv_lora_rank + qk_rope_head_dim)")
    elif not shape.family.latent_attention:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        check_head_dims(shape, CPUAttentionBackend.get_supported_head_sizes(), "vLLM's CPU attention")
    _check_cpu_experts(shape, vllm_config)


def _check_cpu_experts(shape: ModelShape, vllm_config: VllmConfig) -> None:
    lora = vllm_config.lora_config
    if lora is not None and shape.family.experts_keys and "experts" in (lora.target_modules or ["experts"]):
        raise UnsupportedError(
            "--enable-lora: adapters of experts need kernels that vLLM has for GPUs alone. Name the modules"
            " adapters may change, without the experts: --lora-target-modules q_proj k_proj v_proj o_proj."
        )
    expert_parallel = vllm_config.parallel_config.enable_expert_parallel
    if expert_parallel and shape.family.experts_keys:
        # Experts that live on another rank have no weights here, and the CPU kernel reads them all
        # the same: it crashes for every model, structurally pruned or not.
        raise UnsupportedError(
            "--enable-expert-parallel: vLLM's CPU expert kernel cannot spread experts over ranks. "
            "Serve without it; --tensor-parallel-size then splits every expert."
        )


def _check_float16(vllm_config: VllmConfig) -> None:
    """Refuse what only stock's DeepSeek layers do: scaling the whole residual stream down in float16."""
    import torch

    model: Any = vllm_config.model_config
    factor = getattr(model.hf_config, "routed_scaling_factor", None) or 1.0
    if model.dtype == torch.float16 and factor != 1.0:
        raise UnsupportedError(
            f"--dtype float16 with routed_scaling_factor {factor}: the experts' sum would overflow. "
            "Serve with --dtype bfloat16."
        )


def _refuse_equal_layer_features(shape: ModelShape, vllm_config: VllmConfig) -> None:
    """Refuse options whose code in vLLM takes one layer's shape for that of all."""
    parallel: Any = vllm_config.parallel_config
    if parallel.enable_eplb:
        raise UnsupportedError(
            "--enable-eplb balances experts as if every layer had the same number of them. Serve without it."
        )
    kv_heads = {attention.num_kv_heads for _, attention in shape.attention_layers()}
    if vllm_config.kv_transfer_config is not None and len(kv_heads) > 1:
        raise UnsupportedError(
            f"--kv-transfer-config: KV connectors assume equal layers, but this model's layers have "
            f"{', '.join(map(str, sorted(kv_heads)))} KV heads. Serve without a connector."
        )
