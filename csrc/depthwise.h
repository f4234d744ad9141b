// What the gradients of depthwise convolutions check alike.

#pragma once

#include "common.h"

namespace revbifpn {

/// Whether a size is at least `least`, and so small that products of sizes do not overflow.
inline bool is_size(int64_t value, int64_t least) { return value >= least && value < INT32_MAX; }

/// The side of a convolution's result.
inline int64_t convolved_side(int64_t side, int64_t kernel_size, int64_t stride, int64_t padding) {
  return (side + 2 * padding - kernel_size) / stride + 1;
}

} // namespace revbifpn
