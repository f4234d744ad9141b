// The checks that both gradients of a depthwise convolution share.

#pragma once

#include "../common.h"

namespace revbifpn {

/// Raises unless `grad` has the sides of the result of a convolution of maps of height x width, and
/// every size is so small that products of sizes do not overflow.
inline void check_convolution(const char *op, const Maps &grad, int64_t height, int64_t width,
                              int64_t kernel_size, int64_t stride, int64_t padding) {
  const auto is_size = [](int64_t value, int64_t least) {
    return value >= least && value < INT32_MAX;
  };
  STD_TORCH_CHECK(is_size(height, 1) && is_size(width, 1) && is_size(kernel_size, 1) &&
                      is_size(stride, 1) && is_size(padding, 0),
                  op, ": height, width, kernel_size and stride must be at least 1, padding at ",
                  "least 0, all below 2^31, got ", height, ", ", width, ", ", kernel_size, ", ",
                  stride, " and ", padding);
  const auto side = [&](int64_t of) { return (of + 2 * padding - kernel_size) / stride + 1; };
  STD_TORCH_CHECK(grad.height == side(height) && grad.width == side(width), op,
                  ": grad must have the sides of the convolution's result, ", side(height), " x ",
                  side(width), ", got ", grad.height, " x ", grad.width);
}

} // namespace revbifpn
