"""Operators written in Python, as torch.compile and CUDA graphs see them."""

from collections.abc import Callable

import torch
from torch import Tensor

# Operators live as long as the library object that defined them.
_LIBRARY = torch.library.Library("vllm_sparse", "FRAGMENT")


def define(schema: str, body: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Define ``torch.ops.vllm_sparse.<name>``, once per process.

    Args:
        schema: name, arguments and result, as torch's operator schemas are written.
        body: computes it, for CUDA and for CPU tensors.
        fake: an empty tensor of the result's shape and dtype, from tensors without data.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, body, key)
    torch.library.register_fake(f"vllm_sparse::{name}", fake, lib=_LIBRARY)
