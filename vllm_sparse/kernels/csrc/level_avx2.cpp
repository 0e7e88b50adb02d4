// AVX2 + FMA + F16C.
#include "avx2_decode.h"
#include "dense.h"
#include "nibble_a8_avx2.h"
#include "token_lanes.h"

namespace vllm_sparse {

// A constant, so that loading the library executes nothing of this file.
constinit const Level kAvx2Level = {
    {slab<Bf16Ops>, store<Bf16Float>, gather<false>, decode_fast<Bf16Float>, slab<Int8Ops>, store_a8<Bf16Float>,
     quantize<false>, quantize<false, arrange_groups>, nibble_slab, nibble_store<Bf16Float>, direct, direct_tokens,
     dense_slab_avx2, dense_int8_slab_avx2, dense_store_avx2, &kLanesAvx2Bf16, gather_wide<false>},
    {slab<Fp16Ops>, store<Fp16Float>, gather<true>, decode_fast<Fp16Float>, slab<Int8Ops>, store_a8<Fp16Float>,
     quantize<true>, quantize<true, arrange_groups>, nibble_slab, nibble_store<Fp16Float>, direct, direct_tokens,
     nullptr, nullptr, nullptr, &kLanesAvx2Fp16, gather_wide<true>},
};

}  // namespace vllm_sparse
