// AVX2 + FMA + F16C.
#include "avx2_decode.h"
#include "avx2_direct.h"
#include "dense.h"
#include "nibble_a8_avx2.h"
#include "token_lanes.h"

namespace vllm_sparse {

// A constant, so that loading the library executes nothing of this file.
constinit const Level kAvx2Level = {
    {.slab = slab<Bf16Ops>, .store = store<Bf16Float>, .gather = gather<false>, .gather_wide = gather_wide<false>,
     .decode = decode_fast<Bf16Float>, .slab_a8 = slab<Int8Ops>, .store_a8 = store_a8<Bf16Float>,
     .quantize = quantize<false>, .slab_a4 = nibble_slab, .store_a4 = nibble_store<Bf16Float>,
     .quantize_a4 = quantize<false, arrange_groups>, .direct = direct, .direct_tokens = direct_tokens,
     .slab_dense = dense_slab_avx2, .slab_dense_int8 = dense_int8_slab_avx2, .store_dense = dense_store_avx2,
     .lanes = &kLanesAvx2Bf16},
    {.slab = slab<Fp16Ops>, .store = store<Fp16Float>, .gather = gather<true>, .gather_wide = gather_wide<true>,
     .decode = decode_fast<Fp16Float>, .slab_a8 = slab<Int8Ops>, .store_a8 = store_a8<Fp16Float>,
     .quantize = quantize<true>, .slab_a4 = nibble_slab, .store_a4 = nibble_store<Fp16Float>,
     .quantize_a4 = quantize<true, arrange_groups>, .direct = direct, .direct_tokens = direct_tokens,
     .lanes = &kLanesAvx2Fp16},
};

}  // namespace vllm_sparse
