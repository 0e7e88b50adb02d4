"""What happens in each vLLM process when the plugin is loaded."""

import logging
import os
from functools import partial

from vllm_sparse import vllm_versions

# Below "vllm" so that vLLM's logging configuration applies; vLLM itself may not be imported yet.
logger = logging.getLogger("vllm.plugins.vllm_sparse")

VARIABLES = (
    "VLLM_SPARSE_BACKEND",
    "VLLM_SPARSE_DENSE_HEAD",
    "VLLM_SPARSE_DISABLE",
    "VLLM_SPARSE_ISA",
    "VLLM_SPARSE_PREFILL",
    "VLLM_SPARSE_STRICT",
)
_registered = False


def register_once() -> None:
    """Register models, quantisation and metrics, once per process.

    vLLM does not catch what a plugin's entry point raises, and one exception would stop every vLLM process,
    also for models that have nothing to do with this plugin. Failures are therefore logged as errors; a
    checkpoint of ours then ends in vLLM's own 'unknown architecture' or 'unknown quantization'.
    """
    global _registered
    if _registered or os.environ.get("VLLM_SPARSE_DISABLE", "0") == "1":
        return
    _registered = True
    try:
        _register()
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        logger.error("vllm-sparse could not register and stays off: %s: %s", type(error).__name__, error)


def _register() -> None:
    import vllm

    if not _version_is_supported(vllm.__version__):
        return
    _declare_variables()
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_sparse import metrics
    from vllm_sparse.quantization.config import METHOD_NAME, Sparse24Config

    register_quantization_config(METHOD_NAME)(Sparse24Config)
    metrics.prepare_folder()
    metrics.register_collector()
    from vllm_sparse.models import register_models

    register_models()
    _limit_spinning()


def _limit_spinning() -> None:
    """On a CPU without a core to spare; also when a dense model is served, so that comparisons are fair."""
    from vllm import envs
    from vllm.platforms import current_platform

    from vllm_sparse import threads

    if current_platform.is_cpu() and threads.limit_spinning(envs.VLLM_CPU_OMP_THREADS_BIND):
        logger.info("OpenMP threads sleep after %d idle rounds (%s)", threads.SPINS, threads.VARIABLE)


def _declare_variables() -> None:
    """Make this plugin's variables known to vLLM: no 'unknown variable' warning, and part of compile keys."""
    from vllm import envs

    for name in VARIABLES:
        envs.environment_variables.setdefault(name, partial(os.environ.get, name))


def _version_is_supported(found: str) -> bool:
    tested = vllm_versions.tested_range()
    if vllm_versions.is_too_old(found):
        logger.warning(
            "vllm-sparse needs vLLM %s; found %s, so the plugin stays off. Upgrade vLLM.", tested, found
        )
        return False
    if not vllm_versions.is_tested(found):
        logger.warning("vllm-sparse is tested with vLLM %s; found %s, trying all the same", tested, found)
    return True
