"""What torchrun tells its processes through the environment; no torch is imported for it."""

import os


def launched_size() -> int:
    """Processes of the launch, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched_rank() -> int:
    """This process among those of the launch."""
    return int(os.environ.get("RANK") or 0)


def rendezvous() -> tuple[str, int] | None:
    """Host and port of the store that torchrun keeps for its processes; None without torchrun.

    It is there from the start of the launch to its end, whichever process comes late or fails.
    """
    if launched_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
