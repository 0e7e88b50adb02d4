"""A vLLM plugin that serves 2:4 sparse and structurally pruned models.

Importing this package imports neither torch nor vLLM; vLLM calls :func:`register` in each of its
processes through the entry point group ``vllm.general_plugins``.
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of ``vllm.general_plugins``: idempotent, and it never raises into vLLM."""
    from vllm_sparse.plugin import register_once

    register_once()
