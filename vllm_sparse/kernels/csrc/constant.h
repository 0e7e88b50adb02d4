// Vectors whose elements are computed when the library is compiled.
#pragma once

namespace vllm_sparse {
namespace {

// kBytes of T, element i being `element(i)`.
template <int kBytes, class T, class Element>
struct Constant {
  static constexpr int kCount = kBytes / sizeof(T);
  alignas(kBytes) T of[kCount];
  constexpr explicit Constant(Element element) : of() {
    for (int i = 0; i < kCount; ++i) of[i] = static_cast<T>(element(i));
  }
};

}  // namespace
}  // namespace vllm_sparse
