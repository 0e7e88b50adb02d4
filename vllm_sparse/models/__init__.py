"""Structurally pruned models in vLLM: layers that differ in heads, widths, experts or presence.

:func:`register_models` tells vLLM about the classes by name only; neither torch nor vLLM is
imported by importing this package, and no model class is until a checkpoint asks for it.
"""

from typing import Any

from vllm_sparse.models.families import FAMILIES


class _ConfigCheck:
    """What vLLM calls while it builds its config, in the front-end, before any worker starts."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Validate every layer's shape, and the tensors on disk against it."""
        from vllm_sparse.models.verify import check_model_config

        check_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Validate the shapes against ranks, stages and attention kernels."""
        from vllm_sparse.models.verify import check_serving

        check_serving(vllm_config)


def register_models() -> None:
    """Register the model classes with vLLM; safe to call any number of times."""
    from vllm.model_executor.models import config as checks
    from vllm.model_executor.models.registry import ModelRegistry

    from vllm_sparse.models.deepseek_config import register_config
    from vllm_sparse.models.latent_arch import register_convertor

    register_config()
    register_convertor()
    # A vLLM without this table only loses the earlier of two checks: the classes repeat it.
    config_checks = getattr(checks, "MODELS_CONFIG_MAP", {})
    supported = ModelRegistry.get_supported_archs()
    for family in FAMILIES.values():
        if family.architecture not in supported:
            target = f"vllm_sparse.models.{family.model_type}:{family.architecture}"
            ModelRegistry.register_model(family.architecture, target)
        config_checks.setdefault(family.architecture, _ConfigCheck)
