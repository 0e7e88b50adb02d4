// Dense bf16 and int8 weights, for what a checkpoint leaves dense; bf16 also as the baseline of measurements.
#pragma once

#include "kernel.h"

namespace vllm_sparse {

#if defined(__x86_64__)
void dense_slab_avx2(const Slab& slab, void* accumulators);
void dense_int8_slab_avx2(const Slab& slab, void* accumulators);
void dense_store_avx2(const void* accumulators, int tokens, const Epilogue& out);

void dense_slab_avx512bf16(const Slab& slab, void* accumulators);
void dense_int8_slab_avx512bf16(const Slab& slab, void* accumulators);
void dense_store_avx512bf16(const void* accumulators, int tokens, const Epilogue& out);
#endif

}  // namespace vllm_sparse
