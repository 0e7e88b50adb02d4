"""The 2:4 format as pure torch: masks, packing and validation, without vLLM."""

from vllm_sparse.sparse24.bitmask import (
    compress,
    decompress,
    pack_mask,
    unpack_mask,
    validate_bitmask,
)
from vllm_sparse.sparse24.csr import CsrMatrix
from vllm_sparse.sparse24.mask import group_nonzeros, is_24, nonzero_mask, short_group_mask, topk_mask

__all__ = [
    "CsrMatrix",
    "compress",
    "decompress",
    "group_nonzeros",
    "is_24",
    "nonzero_mask",
    "pack_mask",
    "short_group_mask",
    "topk_mask",
    "unpack_mask",
    "validate_bitmask",
]
