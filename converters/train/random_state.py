"""The states of torch's own generators, from which dropout draws: the CPU's and that of the GPU in use."""

import torch
from torch import Tensor

_RANKS_APART = 1_000_003


def start(seed: int, rank: int) -> None:
    """Set the generators of process ``rank``; processes drop different units of their parts of a batch."""
    torch.manual_seed(seed + _RANKS_APART * rank)


def read() -> dict[str, Tensor]:
    """States by device type, each uint8 in main memory; ``cuda`` only where this process uses a GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def write(states: dict[str, Tensor] | Tensor) -> None:
    """Undo of :func:`read`; a tensor alone is the CPU's, as older checkpoints have it."""
    found = {"cpu": states} if isinstance(states, Tensor) else states
    torch.set_rng_state(found["cpu"])
    if "cuda" in found and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(found["cuda"])
