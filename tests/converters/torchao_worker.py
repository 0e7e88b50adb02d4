"""Runs inside a process that imports torchao 0.14: packs weights for its 2:4 Marlin kernel.

Nothing of this repository is imported here, so that what it writes is someone else's work.
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from torchao.sparsity.marlin import pack_to_marlin_24


def pack(job, tensors):
    """``B_24``, ``B_meta`` and ``s`` of each weight, and under ``M.expected`` the numbers they stand for."""
    bits, group = job["bits"], job["group_size"]
    top, result = 2 ** (bits - 1) - 1, {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        rows, cols = weight.shape
        size = cols if group == -1 else group
        groups = weight.float().reshape(rows, -1, size)
        scale = (groups.abs().amax(-1, keepdim=True) / top).to(torch.float16)
        numbers = torch.round(groups / scale.float()).clamp(-top, top)
        result[f"{module}.expected"] = (numbers * scale.float()).reshape(rows, cols)
        unsigned = (numbers.reshape(rows, cols).t().contiguous() + 2 ** (bits - 1)).to(torch.int32)
        packed, scales, meta = pack_to_marlin_24(unsigned, scale.squeeze(-1).t().contiguous(), bits, size)
        result |= {f"{module}.B_24": packed, f"{module}.s": scales, f"{module}.B_meta": meta}
    return result


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    for entry in jobs:
        found = pack(entry, load_file(entry["in"]))
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, entry["out"])
