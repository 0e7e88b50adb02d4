"""cuSPARSELt on the CPU: refuses everything for which the library returns garbage or reads out of bounds."""

import torch

BITS = {1: torch.uint8, 2: torch.int16}


def stamp(number, size):
    """The bytes that stand for a compressed matrix: its number, then what only a true copy has."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.randint(0, 256, (size - 8,), dtype=torch.uint8, generator=generator)
    return torch.cat([torch.tensor([number]).view(torch.uint8), noise])


class Emulated:
    """What cuSPARSELt does with what it is given, on the CPU."""

    def __init__(self) -> None:
        self.matrices: list[torch.Tensor] = []
        self.used: list[int] = []

    def compress(self, dense):
        step = 16 if dense.element_size() == 2 else 32
        assert dense.is_contiguous()
        assert dense.shape[0] % step == 0
        assert dense.shape[1] % step == 0
        # The compressor looks at bits: -0.0 occupies a slot.
        occupied = (dense.view(BITS[dense.element_size()]) != 0).reshape(dense.shape[0], -1, 4).sum(-1)
        assert int(occupied.max()) <= 2, "a group holds more than two values"
        size = dense.numel() * (9 if dense.element_size() == 2 else 10) // 16
        number = len(self.matrices)
        packed = stamp(number, size * dense.element_size())
        self.matrices.append(dense.clone())
        return packed.view(dense.dtype).reshape(dense.shape[0], -1)

    def multiply(self, compressed, x, bias, algorithm):
        if algorithm == 1:
            raise RuntimeError("CUDA error: operation not supported when calling `cusparseLtMatmulPlanInit`")
        dense = self._matrix(compressed)
        assert x.dtype == dense.dtype
        assert x.is_contiguous()
        assert x.shape[1] == dense.shape[1]
        assert x.shape[0] % (8 if x.element_size() == 2 else 16) == 0
        self.used.append(algorithm)
        product = x.float().double() @ dense.float().double().T
        if bias is not None:
            assert x.element_size() == 2, "a bias next to integer sums would be read as integers"
            assert bias.dtype == x.dtype
            assert bias.shape == (dense.shape[0],), "a shorter bias is read beyond its end"
            product = product + bias.double()
        return product.to({torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}.get(x.dtype, x.dtype))

    def _matrix(self, compressed):
        assert compressed.is_contiguous()
        assert compressed.data_ptr() % 16 == 0
        raw = compressed.view(torch.uint8).flatten()
        number = int(raw[:8].view(torch.int64))
        assert torch.equal(raw, stamp(number, raw.numel())), "these are not the bytes of a compressed matrix"
        dense = self.matrices[number]
        sixteenths = 9 if dense.element_size() == 2 else 10
        assert compressed.numel() == dense.numel() * sixteenths // 16, "the sizes are told by the length"
        return dense

    def algorithms(self, compressed, x):
        return [1, 2, 3]
