// Conversion between the canonical form (kept values + bitmask) and the packed layout.
#pragma once

#include "layout.h"

namespace vllm_sparse {

// values: [n, k/2] of canonical_bytes(kind); bitmask: [n, ceil(k/8)] little-endian bits. Returns false if a
// group does not have exactly two bits set (`packed` is then incomplete).
bool pack(Kind kind, Shape shape, const uint8_t* values, const uint8_t* bitmask, uint8_t* packed);

// dense: [n, k] of 16-bit values, in the blocks of Kind::kDense.
void pack_dense(Shape shape, const uint8_t* dense, uint8_t* packed);
// dense: [n, k] of int8, in the blocks of Kind::kDenseInt8.
void pack_dense_int8(Shape shape, const uint8_t* dense, uint8_t* packed);

// dense: [n, k] of canonical_bytes(kind), completely overwritten.
void unpack(Kind kind, Shape shape, const uint8_t* packed, uint8_t* dense);

}  // namespace vllm_sparse
