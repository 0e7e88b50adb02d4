"""What vLLM's configuration is told of a DeepSeek-V2 model whose layers differ.

vLLM derives its KV geometry layer by layer where ``per_layer_config`` is set, and refuses to do so for latent
attention. That geometry does not depend on what our layers may change: the latent has one size. So the
model is described once, by its global values.
"""

from typing import Any

from vllm.transformers_utils import model_arch_config_convertor as stock

from vllm_sparse.models.families import FAMILIES


class LatentArchConvertor(stock.ModelArchConfigConvertorBase):
    """Stock's description, from the global values where the architecture is ours."""

    def get_per_layer_hf_configs(self) -> Any:
        """None, which stands for equal layers; stock's answer for every other checkpoint."""
        ours = {family.architecture for family in FAMILIES.values() if family.latent_attention}
        if ours & set(self.get_architectures()):
            return None
        return super().get_per_layer_hf_configs()


def register_convertor() -> None:
    """Use it for every family with latent attention that has no convertor of its own."""
    for family in FAMILIES.values():
        if family.latent_attention:
            stock.MODEL_ARCH_CONFIG_CONVERTORS.setdefault(family.model_type, LatentArchConvertor)
