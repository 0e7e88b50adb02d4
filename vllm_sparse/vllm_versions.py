"""Which releases of vLLM this plugin is tested with; importable without vLLM."""

OLDEST = (0, 30)
NEWEST = (0, 33)


def release(version: str) -> tuple[int, ...] | None:
    """Major and minor number of a version such as ``0.32.0+cpu``; None for ``dev`` and the like."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int(part) for part in parts) if len(parts) == 2 and all(map(str.isdigit, parts)) else None


def is_tested(version: str) -> bool:
    """Whether a version lies between the oldest and the newest tested one."""
    found = release(version)
    return found is not None and OLDEST <= found <= NEWEST


def is_too_old(version: str) -> bool:
    """Whether a version is older than the oldest that the plugin works with."""
    found = release(version)
    return found is not None and found < OLDEST


def tested_range() -> str:
    """For messages: ``0.30 to 0.33``."""
    return " to ".join(".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST))
