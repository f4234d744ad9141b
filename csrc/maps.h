// Maps in memory and the types of their elements, for operators (which know tensors) and kernels
// (which know rows). Plain C++, no PyTorch.

#pragma once

#include <cstdint>
#include <type_traits>

namespace revbifpn {

// Float32 in the widest register, and in a cache line. What kernels divide by it is divided alike
// on every machine, so that sums have the same bits.
constexpr int64_t LANES = 16;

constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Dtype { float64, float32, bfloat16, float16 };

/// The type in which sums over elements of type T are computed.
template <class T>
using accumulator_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// A tensor (N, C, height, width); strides are in elements.
struct Maps {
  void *data;
  Dtype dtype;
  int64_t height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;

  template <class T> T *at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return static_cast<T *>(data) + n * stride_n + c * stride_c + h * stride_h + w * stride_w;
  }
};

} // namespace revbifpn
