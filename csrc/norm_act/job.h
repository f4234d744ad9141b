// Batch norm, activation and gate as the operators describe them to the kernels. Plain C++, no
// PyTorch.

#pragma once

#include "../maps.h"

namespace revbifpn {

enum class Act { identity, relu, hardswish, silu };

/// xc = x - mean, z = xc * invstd * weight + bias, y = act(z) * gate, over the pixels of (N, C, H,
/// W). Where channels lie side by side a unit of work is one (image, chunk of pixels), else one
/// plane; neither depends on the number of threads, so sums have the same bits on any.
template <class Acc> struct NormJob {
  using Workspace = double;
  static constexpr int64_t MOST_SUMS = 5;

  Maps x, grad, y;             // y: the result
  const Acc *mean, *invstd;    // (C)
  const Acc *weight, *bias;    // (C) or null
  const Acc *gate, *grad_mean; // (N, C) or null; grad_mean is added to each pixel's gradient
  const Acc *offset, *tilt;    // (C) or null: dx = invstd * weight * (dz - offset - tilt * xc)
  double *sums;                // (sums, units, channels of a unit)
  Act act;
  bool lanes_are_channels;
  int64_t images, channels, pixels, chunk_pixels;

  int64_t planes() const { return images * channels; }
  /// Chunks of a plane.
  int64_t chunks() const { return lanes_are_channels ? ceil_div(pixels, chunk_pixels) : 1; }
  int64_t units() const { return images * (lanes_are_channels ? chunks() : channels); }
  /// Channels of a unit.
  int64_t width() const { return lanes_are_channels ? channels : 1; }
  /// Room for MOST_SUMS sums per channel, and for a mean, where the channels fill whole vectors.
  int64_t workspace_size() const { return (width() + 2 * LANES) * (MOST_SUMS + 1); }
  double &sum(int64_t k, int64_t unit, int64_t channel) const {
    return sums[(k * units() + unit) * width() + channel];
  }
  /// Sum k of a chunk of plane (n, c).
  double sum_of(int64_t k, int64_t n, int64_t c, int64_t chunk) const {
    return lanes_are_channels ? sum(k, n * chunks() + chunk, c) : sum(k, n * channels + c, 0);
  }
};

} // namespace revbifpn
