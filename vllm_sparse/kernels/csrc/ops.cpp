// The operators, registered through libtorch's stable ABI: one library serves torch 2.10 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <vector>

#include "baseline.h"
#include "convert.h"
#include "experts.h"
#include "isa.h"
#include "linear.h"
#include "pack.h"
#include "pages.h"
#include "parallel.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vllm_sparse::Kind;
using vllm_sparse::Shape;

// The canonical form's dtype.
ScalarType value_type(Kind kind) {
  switch (kind) {
    case Kind::kBf16: return ScalarType::BFloat16;
    case Kind::kFp16: return ScalarType::Half;
    case Kind::kFp8: return ScalarType::Float8_e4m3fn;
    default: return ScalarType::Char;
  }
}

Kind to_kind(int64_t kind) {
  STD_TORCH_CHECK(kind >= 0 && kind < vllm_sparse::kKinds, "vllm_sparse: unknown weight kind ", kind);
  return static_cast<Kind>(kind);
}

Shape to_shape(int64_t n, int64_t k) {
  STD_TORCH_CHECK(n > 0 && k > 0 && k % 4 == 0, "vllm_sparse: a 2:4 weight of ", n, "x", k, " is impossible");
  return {n, k};
}

const uint8_t* packed_data(const Tensor& packed, Shape shape, Kind kind, int64_t layers = 1) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte &&
                      packed.numel() == layers * shape.packed_bytes(kind),
                  "vllm_sparse: packed weight is not the ", layers, " x ", shape.packed_bytes(kind),
                  " bytes that a ", shape.n, "x", shape.k, " layer packs to");
  return static_cast<const uint8_t*>(packed.const_data_ptr());
}

// The bias as float32, padded to whole panels, in this thread's scratch memory.
const float* bias_data(const std::optional<Tensor>& bias, Shape shape) {
  if (!bias.has_value()) return nullptr;
  thread_local vllm_sparse::Scratch scratch;
  const Tensor source = torch::stable::contiguous(*bias);
  STD_TORCH_CHECK(source.is_cpu() && source.dim() == 1 && source.size(0) == shape.n,
                  "vllm_sparse: bias must be a vector of ", shape.n, " on the CPU");
  float* padded = scratch.get<float>(shape.padded_n());
  const void* data = source.const_data_ptr();
  const ScalarType type = source.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "vllm_sparse: bias must be float32, bfloat16 or float16");
  for (int64_t i = 0; i < shape.padded_n(); ++i) {
    if (i >= shape.n) {
      padded[i] = 0.0f;
    } else if (type == ScalarType::Float) {
      padded[i] = static_cast<const float*>(data)[i];
    } else {
      const uint16_t bits = static_cast<const uint16_t*>(data)[i];
      padded[i] = type == ScalarType::Half ? vllm_sparse::fp16_to_float(bits) : vllm_sparse::bf16_to_float(bits);
    }
  }
  return padded;
}

Tensor pack_24(const Tensor& values, const Tensor& bitmask, int64_t n, int64_t k, int64_t kind_code) {
  const Kind kind = to_kind(kind_code);
  const Shape shape = to_shape(n, k);
  STD_TORCH_CHECK(values.is_cpu() && values.is_contiguous() && values.scalar_type() == value_type(kind) &&
                      values.numel() == n * (k / 2),
                  "vllm_sparse: values must be a contiguous [n, k/2] CPU tensor of the weight's type");
  STD_TORCH_CHECK(bitmask.is_cpu() && bitmask.is_contiguous() && bitmask.scalar_type() == ScalarType::Byte &&
                      bitmask.numel() == n * vllm_sparse::ceil_div(k, 8),
                  "vllm_sparse: bitmask must be a contiguous [n, ceil(k/8)] CPU tensor of uint8");
  const std::array<int64_t, 1> size{shape.packed_bytes(kind)};
  Tensor packed = torch::stable::new_empty(bitmask, {size.data(), size.size()}, ScalarType::Byte);
  const bool good = vllm_sparse::pack(kind, shape, static_cast<const uint8_t*>(values.const_data_ptr()),
                                      static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                                      static_cast<uint8_t*>(packed.mutable_data_ptr()));
  STD_TORCH_CHECK(good, "vllm_sparse: bitmask is not 2:4");
  return packed;
}

Tensor unpack_24(const Tensor& packed, int64_t n, int64_t k, int64_t kind_code) {
  const Kind kind = to_kind(kind_code);
  const Shape shape = to_shape(n, k);
  const uint8_t* data = packed_data(packed, shape, kind);
  const std::array<int64_t, 2> size{n, k};
  Tensor dense = torch::stable::new_empty(packed, {size.data(), size.size()}, value_type(kind));
  vllm_sparse::unpack(kind, shape, data, static_cast<uint8_t*>(dense.mutable_data_ptr()));
  return dense;
}

// How many scales a layer has, in the order that the schemas below describe; 0 for 16-bit weights.
int64_t scale_count(Kind kind, Shape shape, int64_t group) {
  if (vllm_sparse::is_wide(kind)) return 0;
  STD_TORCH_CHECK(group >= 0 && group % vllm_sparse::kChunk == 0 && (group == 0 || kind != Kind::kInt8A8),
                  "vllm_sparse: scale groups must be multiples of ", vllm_sparse::kChunk,
                  " columns; int8 weights with int8 activations have none");
  const int64_t groups = group > 0 ? vllm_sparse::ceil_div(shape.padded_k(), group) : 1;
  return shape.padded_n() * (groups + (vllm_sparse::has_int8_activations(kind) ? 1 : 0));
}

// The scales of `layers` layers, or null.
const float* scale_data(const std::optional<Tensor>& scale, int64_t layers, int64_t count) {
  if (count == 0) {
    STD_TORCH_CHECK(!scale.has_value(), "vllm_sparse: 16-bit weights have no scale");
    return nullptr;
  }
  STD_TORCH_CHECK(scale.has_value(), "vllm_sparse: quantised weights need a scale");
  STD_TORCH_CHECK(scale->is_cpu() && scale->is_contiguous() && scale->scalar_type() == ScalarType::Float &&
                      scale->numel() == layers * count,
                  "vllm_sparse: scale must be ", layers * count, " contiguous float32 numbers on the CPU");
  return static_cast<const float*>(scale->const_data_ptr());
}

// [..., n] in x's dtype. Straight through the C shim: the dispatcher's look-up by name costs a microsecond.
Tensor empty_output(const Tensor& x, int64_t n, int32_t dtype) {
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = n;
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t d = size.size() - 1; d > 0; --d) stride[d - 1] = stride[d] * std::max<int64_t>(size[d], 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_output(const Tensor& x, int64_t n) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return empty_output(x, n, dtype);
}

Tensor linear_24(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& bias, int64_t n, int64_t k, int64_t kind_code, int64_t group) {
  vllm_sparse::LinearArgs args{};
  args.kind = to_kind(kind_code);
  args.shape = to_shape(n, k);
  args.packed = packed_data(packed, args.shape, args.kind);
  const int64_t dims = x.dim();
  const ScalarType type = x.scalar_type();
  args.half = type == ScalarType::Half;
  const bool fits = vllm_sparse::is_wide(args.kind) ? type == value_type(args.kind)
                                                    : args.half || type == ScalarType::BFloat16;
  STD_TORCH_CHECK(x.is_cpu() && dims >= 1 && x.size(dims - 1) == k && fits,
                  "vllm_sparse: the input must be a CPU tensor [..., ", k, "] of a 16-bit float type that fits");
  const Tensor input = x.is_contiguous() ? x : torch::stable::contiguous(x);
  Tensor y = empty_output(x, n);
  args.x = static_cast<const uint16_t*>(input.const_data_ptr());
  args.m = x.numel() / k;
  const float* scales = scale_data(scale, 1, scale_count(args.kind, args.shape, group));
  if (scales != nullptr) vllm_sparse::set_scales(args, scales, group);
  args.bias = bias_data(bias, args.shape);
  args.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  vllm_sparse::linear(args);
  return y;
}

// ---- Experts ---------------------------------------------------------------------------------------------------

vllm_sparse::Projection projection(const Tensor& packed, const std::optional<Tensor>& scale, Kind kind, Shape shape,
                                   int64_t group) {
  const int64_t experts = packed.dim() == 2 ? packed.size(0) : 0;
  const int64_t count = scale_count(kind, shape, group);
  return {shape, packed_data(packed, shape, kind, experts), scale_data(scale, experts, count), count};
}

Tensor experts_packed_24(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& gate_up,
                         const std::optional<Tensor>& gate_up_scale, const Tensor& down,
                         const std::optional<Tensor>& down_scale, int64_t width, int64_t kind_code, int64_t group,
                         int64_t activation) {
  vllm_sparse::ExpertsArgs args{};
  args.kind = to_kind(kind_code);
  const ScalarType type = x.scalar_type();
  args.half = type == ScalarType::Half;
  const bool fits = vllm_sparse::is_wide(args.kind) ? type == value_type(args.kind)
                                                    : args.half || type == ScalarType::BFloat16;
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.is_contiguous() && fits,
                  "vllm_sparse: the input must be a contiguous CPU matrix of a 16-bit float type that fits");
  const auto routed = [&](const Tensor& t, ScalarType wanted) {
    return t.is_cpu() && t.dim() == 2 && t.is_contiguous() && t.scalar_type() == wanted && t.size(0) == x.size(0) &&
           t.size(1) == topk_ids.size(1);
  };
  STD_TORCH_CHECK(routed(topk_ids, ScalarType::Long) && routed(topk_weights, ScalarType::Float),
                  "vllm_sparse: topk_ids must be int64 and topk_weights float32, contiguous [tokens, top_k]");
  STD_TORCH_CHECK(activation >= 0 && activation < vllm_sparse::kActivations, "vllm_sparse: unknown activation ",
                  activation);
  const int64_t hidden = x.size(1);
  args.activation = static_cast<vllm_sparse::Activation>(activation);
  args.group = group;
  args.gate_up = projection(gate_up, gate_up_scale, args.kind, to_shape(2 * width, hidden), group);
  args.down = projection(down, down_scale, args.kind, to_shape(hidden, width), group);
  args.experts = gate_up.size(0);
  args.m = x.size(0);
  args.top_k = topk_ids.size(1);
  args.ids = static_cast<const int64_t*>(topk_ids.const_data_ptr());
  args.weights = static_cast<const float*>(topk_weights.const_data_ptr());
  const int64_t* end = args.ids + args.m * args.top_k;
  STD_TORCH_CHECK(down.size(0) == args.experts &&
                      std::all_of(args.ids, end, [&](int64_t id) { return id < args.experts; }),
                  "vllm_sparse: there are ", args.experts, " experts; topk_ids or the down projection has more");
  Tensor y = empty_output(x, hidden);
  args.x = static_cast<const uint16_t*>(x.const_data_ptr());
  args.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  vllm_sparse::experts(args);
  return y;
}

// ---- Memory ----------------------------------------------------------------------------------------------------

Tensor empty_huge(const Tensor& like, int64_t bytes) {
  STD_TORCH_CHECK(like.is_cpu() && bytes >= 0, "vllm_sparse: empty_huge makes CPU tensors");
  return vllm_sparse::huge_bytes(like, bytes);
}

void join_pages(const Tensor& data) {
  STD_TORCH_CHECK(data.is_cpu() && data.is_contiguous(), "vllm_sparse: join_pages takes a contiguous CPU tensor");
  const int64_t bytes = data.numel() * static_cast<int64_t>(data.element_size());
  vllm_sparse::join_pages(static_cast<const uint8_t*>(data.const_data_ptr()), bytes);
}

// ---- Dense weights ---------------------------------------------------------------------------------------------

Tensor pack_dense(const Tensor& weight) {
  const bool int8 = weight.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(weight.is_cpu() && weight.is_contiguous() && weight.dim() == 2 && weight.numel() > 0 &&
                      (int8 || weight.scalar_type() == ScalarType::BFloat16),
                  "vllm_sparse: pack_dense takes a contiguous bf16 or int8 CPU matrix [n, k]");
  const Shape shape{weight.size(0), weight.size(1)};
  Tensor packed = vllm_sparse::huge_bytes(weight, shape.packed_bytes(int8 ? Kind::kDenseInt8 : Kind::kDense));
  const auto* source = static_cast<const uint8_t*>(weight.const_data_ptr());
  auto* target = static_cast<uint8_t*>(packed.mutable_data_ptr());
  int8 ? vllm_sparse::pack_dense_int8(shape, source, target) : vllm_sparse::pack_dense(shape, source, target);
  vllm_sparse::join_pages(target, packed.numel());
  return packed;
}

Tensor linear_dense(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& scale,
                    const std::optional<Tensor>& bias, int64_t n, int64_t k, bool wide) {
  STD_TORCH_CHECK(n > 0 && k > 0, "vllm_sparse: a weight of ", n, "x", k, " is impossible");
  STD_TORCH_CHECK(vllm_sparse::kernels().bf16.slab_dense != nullptr,
                  "vllm_sparse: dense weights need AVX2");
  vllm_sparse::LinearArgs args{};
  args.kind = scale.has_value() ? Kind::kDenseInt8 : Kind::kDense;
  args.shape = {n, k};
  args.packed = packed_data(packed, args.shape, args.kind);
  if (scale.has_value()) {
    STD_TORCH_CHECK(scale->is_cpu() && scale->is_contiguous() && scale->scalar_type() == ScalarType::Float &&
                        scale->numel() == args.shape.padded_n(),
                    "vllm_sparse: the scale must be ", args.shape.padded_n(), " float32 on the CPU");
    args.channel_scale = static_cast<const float*>(scale->const_data_ptr());
  }
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(x.is_cpu() && dims >= 1 && x.size(dims - 1) == k && x.scalar_type() == ScalarType::BFloat16,
                  "vllm_sparse: the input must be a bf16 CPU tensor [..., ", k, "]");
  const Tensor input = x.is_contiguous() ? x : torch::stable::contiguous(x);
  Tensor y = empty_output(x, n, wide ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16());
  args.x = static_cast<const uint16_t*>(input.const_data_ptr());
  args.m = x.numel() / k;
  args.bias = bias_data(bias, args.shape);
  if (wide) {
    args.wide = static_cast<float*>(y.mutable_data_ptr());
  } else {
    args.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  }
  vllm_sparse::linear(args);
  return y;
}

// ---- For measurements ------------------------------------------------------------------------------------------

int64_t read_all(const Tensor& data) {
  STD_TORCH_CHECK(data.is_cpu() && data.is_contiguous(), "vllm_sparse: read_all takes a contiguous CPU tensor");
  const int64_t bytes = data.numel() * static_cast<int64_t>(data.element_size());
  return static_cast<int64_t>(vllm_sparse::read_all(static_cast<const uint8_t*>(data.const_data_ptr()), bytes));
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_sparse, m) {
  // scale, float32, N padded to 8: [N] per channel; with group > 0 columns per group [N/8, K/group, 8]. For int8
  // activations N numbers follow, 128 * the sum of each channel's values, by their group scales if there are any.
  m.def(
      "linear_24(Tensor x, Tensor packed, Tensor? scale, Tensor? bias, int n, int k, int kind, int group) -> "
      "Tensor");
  // gate_up [experts, bytes] holds gate's `width` rows, then up's; scales as above, per expert. Negative ids are
  // experts of other ranks. activation: 0 SiLU, 1 GELU, 2 GELU by tanh.
  m.def(
      "experts_packed_24(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor gate_up, Tensor? gate_up_scale, "
      "Tensor down, Tensor? down_scale, int width, int kind, int group, int activation) -> Tensor");
  m.def("pack_24(Tensor values, Tensor bitmask, int n, int k, int kind) -> Tensor");
  // bf16, or int8 with scale [N padded to 8], float32. wide: the float32 sums, unrounded.
  m.def("linear_dense(Tensor x, Tensor packed, Tensor? scale, Tensor? bias, int n, int k, bool wide) -> Tensor");
  m.def("pack_dense(Tensor weight) -> Tensor");
  m.def("empty_huge(Tensor like, int bytes) -> Tensor");
  m.def("join_pages(Tensor data) -> ()");
  m.def("read_all(Tensor data) -> int");
  m.def("unpack_24(Tensor packed, int n, int k, int kind) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_sparse, CPU, m) {
  m.impl("linear_24", TORCH_BOX(&linear_24));
  m.impl("experts_packed_24", TORCH_BOX(&experts_packed_24));
  m.impl("pack_24", TORCH_BOX(&pack_24));
  m.impl("unpack_24", TORCH_BOX(&unpack_24));
  m.impl("linear_dense", TORCH_BOX(&linear_dense));
  m.impl("pack_dense", TORCH_BOX(&pack_dense));
  m.impl("empty_huge", TORCH_BOX(&empty_huge));
  m.impl("join_pages", TORCH_BOX(&join_pages));
  m.impl("read_all", TORCH_BOX(&read_all));
}

// Facts and control for Python (ctypes): levels are numbered as in kernel.h.
#define EXPORTED __attribute__((visibility("default")))
extern "C" {
EXPORTED int vllm_sparse_supported_levels() { return vllm_sparse::supported_levels(); }
EXPORTED int vllm_sparse_current_level() { return vllm_sparse::current_level(); }
EXPORTED int vllm_sparse_set_level(int level) { return vllm_sparse::set_level(level) ? 1 : 0; }
// 0: this level has no way of its own for many tokens of this kind; -1: it computes something else than the loops.
EXPORTED int64_t vllm_sparse_many_tokens_from(int64_t kind, int measure) {
  const vllm_sparse::ManyTokens* way = vllm_sparse::many_tokens();
  vllm_sparse::LinearArgs args{};
  args.kind = static_cast<Kind>(kind);
  args.half = args.kind == Kind::kFp16;
  if (way == nullptr || !way->supports(args)) return 0;
  try {
    const int64_t from = measure != 0 ? vllm_sparse::measure_many_tokens(*way, args.kind) : way->from(*way, args.kind);
    return from == vllm_sparse::kNever ? 0 : from;
  } catch (const std::runtime_error&) {
    return -1;
  }
}
}
