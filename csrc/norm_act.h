// What the operators and kernels of batch norm, activation and gate share. Plain C++, no PyTorch.

#pragma once

#include "resample.h"

namespace revbifpn {

enum class Act { identity, relu, hardswish, silu };

/// xc = x - mean, z = xc * invstd * weight + bias, y = act(z) * gate, over the pixels of (N, C, H,
/// W). Where channels lie side by side a unit of work is one (image, chunk of pixels), else one
/// plane; neither depends on the number of threads, so sums have the same bits on any.
template <class Acc> struct NormJob {
  static constexpr int64_t LANES = 16;
  static constexpr int64_t MOST_SUMS = 5;

  Maps x, grad, y;             // y: what is written
  const Acc *mean, *invstd;    // (C)
  const Acc *weight, *bias;    // (C) or null
  const Acc *gate, *grad_mean; // (N, C) or null: the gate; what each pixel adds to its gradient
  const Acc *offset, *tilt;    // (C) or null: dx = invstd * weight * (dz - offset - tilt * xc)
  double *sums;                // (sums, units, channels of a unit)
  Act act;
  bool lanes_are_channels;
  int64_t images, channels, pixels, chunk_pixels;

  int64_t chunks() const { return (pixels + chunk_pixels - 1) / chunk_pixels; }
  int64_t units() const { return images * (lanes_are_channels ? chunks() : channels); }
  /// Channels of a unit.
  int64_t width() const { return lanes_are_channels ? channels : 1; }
  int64_t blocks() const { return (width() + LANES - 1) / LANES; }
  double &sum(int64_t k, int64_t unit, int64_t channel) const {
    return sums[(k * units() + unit) * width() + channel];
  }
};

/// Sums of every block of channels.
template <class Acc> int64_t workspace_size(const NormJob<Acc> &job) {
  return job.blocks() * NormJob<Acc>::LANES * NormJob<Acc>::MOST_SUMS;
}

// As in resample.h. `statistics_units` sums x - first, its square, and x, where first is the mean
// of the unit's first pixels; `means_units` act(z); `plain_sums_units` grad * act'(z) and that
// times xc; `gated_sums_units` also act'(z), that times xc, and grad * act(z).
#define REVBIFPN_DECLARE_NORM_KERNELS(isa)                                                         \
  namespace isa {                                                                                  \
  template <class T>                                                                               \
  void statistics_units(const NormJob<accumulator_t<T>> &, int64_t, int64_t, double *);            \
  template <class T>                                                                               \
  void means_units(const NormJob<accumulator_t<T>> &, int64_t, int64_t, double *);                 \
  template <class T>                                                                               \
  void norm_act_units(const NormJob<accumulator_t<T>> &, int64_t, int64_t, double *);              \
  template <class T>                                                                               \
  void plain_sums_units(const NormJob<accumulator_t<T>> &, int64_t, int64_t, double *);            \
  template <class T>                                                                               \
  void gated_sums_units(const NormJob<accumulator_t<T>> &, int64_t, int64_t, double *);            \
  template <class T>                                                                               \
  void norm_grad_units(const NormJob<accumulator_t<T>> &, int64_t, int64_t, double *);             \
  }
REVBIFPN_DECLARE_NORM_KERNELS(baseline)
#ifdef __x86_64__
REVBIFPN_DECLARE_NORM_KERNELS(avx2)
REVBIFPN_DECLARE_NORM_KERNELS(avx512)
#endif

} // namespace revbifpn
