"""How long the OpenMP threads of a CPU worker spin for work before they sleep.

vLLM limits the spinning of Intel's OpenMP (``KMP_BLOCKTIME``), not that of GNU's, which is the one that it
loads by itself. GNU's threads spin for milliseconds: all through the part of a step that is Python. Where no
core was left to vLLM's other processes, the engine cannot run meanwhile, and the step waits for the engine.
"""

import os

VARIABLE = "GOMP_SPINCOUNT"
# About a quarter of a millisecond: longer than the gaps between the operators of a model, shorter than
# sampling and scheduling. A tenth of it served as fast.
SPINS = 20_000


def limit_spinning(binding: str) -> bool:
    """Set the limit for the workers that this process will start; libgomp reads it when it is loaded.

    Args:
        binding: ``VLLM_CPU_OMP_THREADS_BIND``. With ``auto`` vLLM leaves a core to its other processes.

    Returns:
        Whether it was set; a user's own ``GOMP_SPINCOUNT`` or ``OMP_WAIT_POLICY`` stays.
    """
    if binding == "auto" or VARIABLE in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return False
    os.environ[VARIABLE] = str(SPINS)
    return True
