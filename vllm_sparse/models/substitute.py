"""Put our layer class where a stock model names its own without offering a hook."""

import contextlib
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def substituted(module: ModuleType, name: str, replacement: type) -> Iterator[None]:
    """Replace ``module.name`` while one model is built; always put the stock class back.

    Raises:
        AttributeError: The module has no such name, as after a change in vLLM.
    """
    stock = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, stock)
