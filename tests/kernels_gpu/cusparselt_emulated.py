"""cuSPARSELt on the CPU: refuses everything for which the library returns garbage or reads out of bounds.

Sizes and failures are those of cuSPARSELt 0.8.0 under torch 2.11 on an H200.
"""

import torch

BITS = {1: torch.uint8, 2: torch.int16}


def form_bytes(n, k, element_size):
    """Bytes of a compressed ``[n, k]``: half the elements, and a bit for each of those in whole tiles."""
    # Tiles of 64 x 64, of the narrowest 16-bit matrices 64 x 32.
    columns = 32 if element_size == 2 and k <= 32 else -(-k // 64) * 64
    return n * k * element_size // 2 + -(-n // 64) * 64 * columns // 8


def form_shape(n, k, element_size):
    """Shape of the tensor in which torch returns them: as many rows as the matrix has, of whole elements."""
    return n, -(-form_bytes(n, k, element_size) // (n * element_size))


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
        self.lost = False

    def _alive(self):
        """As after an illegal instruction every call fails, whoever makes it."""
        if self.lost:
            raise RuntimeError("CUDA error: an illegal instruction was encountered")

    def compress(self, dense):
        self._alive()
        step = 16 if dense.element_size() == 2 else 32
        assert dense.is_contiguous()
        assert dense.shape[0] % step == 0
        assert dense.shape[1] % step == 0
        # The compressor looks at bits: -0.0 occupies a slot.
        occupied = (dense.view(BITS[dense.element_size()]) != 0).reshape(dense.shape[0], -1, 4).sum(-1)
        assert int(occupied.max()) <= 2, "a group holds more than two values"
        stamped = stamp(len(self.matrices), form_bytes(*dense.shape, dense.element_size()))
        self.matrices.append(dense.clone())
        rows, columns = form_shape(*dense.shape, dense.element_size())
        packed = torch.zeros(rows, columns * dense.element_size(), dtype=torch.uint8)
        packed.view(-1)[: stamped.numel()] = stamped
        return packed.view(dense.dtype)

    def multiply(self, compressed, x, bias, algorithm):
        self._alive()
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
        assert 0 <= number < len(self.matrices), "these are not the bytes of a compressed matrix"
        dense = self.matrices[number]
        n, k = dense.shape
        shape = form_shape(n, k, dense.element_size())
        assert tuple(compressed.shape) == shape, (
            f"the form of a {n}x{k} {dense.dtype} matrix is {shape}, this is {tuple(compressed.shape)}: "
            "torch takes N from its rows, and all its bytes are read"
        )
        stamped = stamp(number, form_bytes(n, k, dense.element_size()))
        assert torch.equal(raw[: stamped.numel()], stamped), "these are not the bytes of a compressed matrix"
        return dense

    def algorithms(self, compressed, x):
        self._alive()
        if self._matrix(compressed).dtype == torch.float16:
            self.lost = True
            raise RuntimeError("CUDA error: internal error when calling `cusparseLtMatmulSearch`")
        return [1, 2, 3]
