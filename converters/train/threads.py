"""How torch's CPU threads wait for each other."""

import os
import sys

_VARIABLE = "OMP_WAIT_POLICY"


def wait_passively() -> None:
    """Load torch with OpenMP threads that sleep at barriers instead of spinning.

    Small matrices mean many barriers. On a machine with other work, spinning threads take the very cores
    they wait for: one busy neighbour made a training step on 2 cores 8.8 times slower (4.09 against 0.47 s).
    The setting is read once, when the OpenMP library loads, and is not passed on to child processes. It does
    nothing when torch is loaded already or the user has set a policy.
    """
    if "torch" in sys.modules or _VARIABLE in os.environ:
        return
    os.environ[_VARIABLE] = "PASSIVE"
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[_VARIABLE]
