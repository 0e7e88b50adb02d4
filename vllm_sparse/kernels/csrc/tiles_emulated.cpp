// What a matrix unit computes, in plain C++.
#include <algorithm>

#include "convert.h"
#include "tiles.h"

namespace vllm_sparse {
namespace {

float bf16_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return to_float<false>(bits);
}

struct Bf16 {
  using Sum = float;
  static void add(float& sum, const uint8_t* weights, const uint8_t* tokens) {
    sum += bf16_at(weights) * bf16_at(tokens);
    sum += bf16_at(weights + 2) * bf16_at(tokens + 2);
  }
};

struct Bytes {
  using Sum = int32_t;
  static void add(int32_t& sum, const uint8_t* weights, const uint8_t* tokens) {
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(weights[i]) * tokens[i];
  }
};

template <class Type>
void multiply_tile(const uint8_t* weights, const uint8_t* tokens, int64_t steps, typename Type::Sum* sums) {
  constexpr int64_t kWords = kLine / 4;
  for (int64_t step = 0; step < steps; ++step, weights += kStepBytes, tokens += kStepBytes) {
    for (int64_t row = 0; row < kTileRows; ++row) {
      for (int64_t word = 0; word < kWords; ++word) {
        const uint8_t* const weight = weights + row * kLine + 4 * word;
        for (int64_t token = 0; token < kTileTokens; ++token) {
          Type::add(sums[row * kTileTokens + token], weight, tokens + word * kLine + 4 * token);
        }
      }
    }
  }
}

template <class Type>
void multiply(const TileProduct& p) {
  using Sum = typename Type::Sum;
  for (int j = 0; j < 2 && p.tokens[j] != nullptr; ++j) {
    for (int i = 0; i < 2; ++i) {
      Sum* sums = static_cast<Sum*>(p.sums[i][j]);
      if (p.fresh) std::fill(sums, sums + kTileSums, Sum{0});
      multiply_tile<Type>(p.weights[i], p.tokens[j], p.steps, sums);
    }
  }
}

void nothing() {}

}  // namespace

const MatrixUnit kEmulatedTiles = {nothing, nothing, multiply<Bf16>, multiply<Bytes>};

}  // namespace vllm_sparse
