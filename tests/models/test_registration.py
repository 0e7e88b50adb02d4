"""Registering costs nothing until a checkpoint asks for a class."""

import subprocess
import sys

SCRIPT = """
import sys
import vllm_sparse.models
assert not {"torch", "vllm", "transformers"} & set(sys.modules), "importing the package is not free"
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
stock = set(ModelRegistry.get_supported_archs())
before = set(sys.modules)
vllm_sparse.models.register_models()
vllm_sparse.models.register_models()
loaded = {name for name in set(sys.modules) - before if name.startswith("vllm_sparse.models.")}
# What reads a config is needed before any class is.
loaded -= {"vllm_sparse.models.deepseek_config", "vllm_sparse.models.latent_arch"}
assert not loaded, f"registering loads {loaded}"
ours = {family.architecture for family in vllm_sparse.models.FAMILIES.values()}
assert set(ModelRegistry.get_supported_archs()) - stock == ours
assert ours <= set(MODELS_CONFIG_MAP)
"""


def test_registering_is_lazy_and_may_be_repeated() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
