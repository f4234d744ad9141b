// The gradients of depthwise convolutions as the operators describe them to the kernels; maps are
// channels_last. Plain C++, no PyTorch.

#pragma once

#include "../maps.h"

namespace revbifpn {

/// sums[n, c, i, j] = sum over pixels (h, w) of grad[n, c, h, w] times
/// x[n, c, h * stride + i - padding, w * stride + j - padding]. A unit of work is one (image, block
/// of channels, row i of the kernel).
template <class Acc> struct DepthwiseWeightJob {
  using Workspace = Acc;

  Maps x, grad;
  int64_t channels, kernel_size, stride, padding;
  Acc *sums;

  int64_t workspace_size() const { return 0; }
  int64_t blocks() const { return ceil_div(channels, LANES); }
  Acc &sum(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return sums[((n * channels + c) * kernel_size + i) * kernel_size + j];
  }
};

/// result[n, c, h, w] is the sum of
/// grad[n, c, (h + padding - i) / stride, (w + padding - j) / stride] * weight[c, i, j] over the
/// taps where both divide. A unit of work is a row of the result.
template <class Acc> struct DepthwiseInputJob {
  using Workspace = Acc;

  Maps result, grad;
  int64_t channels, kernel_size, stride, padding;
  const void *weights; // (C, kernel_size, kernel_size), of grad's type

  int64_t taps() const { return kernel_size * kernel_size; }
  int64_t workspace_size() const { return taps() * channels; } // the weights again, as (taps, C)
};

} // namespace revbifpn
