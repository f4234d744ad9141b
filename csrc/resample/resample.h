// The checks and steps that the operators of resampling share.

#pragma once

#include "../common.h"

namespace revbifpn {

/// Raises unless `sources` are 1 to MAX_SOURCES maps that may stand beside x, whose dtype it
/// returns.
inline Dtype check_sources(const char *op, const Tensor &x, const TensorList &sources) {
  const Dtype x_dtype = maps_of(op, x).dtype;
  STD_TORCH_CHECK(sources.size() >= 1 && sources.size() <= MAX_SOURCES, op, ": takes 1 to ",
                  MAX_SOURCES, " sources, got ", sources.size());
  for (const Tensor &source : sources) {
    const Dtype dtype = maps_of(op, source).dtype;
    const bool is_half = dtype == Dtype::bfloat16 || dtype == Dtype::float16;
    check_same_planes(op, x, source);
    STD_TORCH_CHECK(dtype == x_dtype || (is_half && x_dtype == Dtype::float32), op,
                    ": sources must have x's dtype, or bfloat16 or float16 beside a float32 x");
  }
  return x_dtype;
}

/// How maps of h x w are resampled to height x width; raises where they cannot be.
inline Kind kind_of(const char *op, int64_t h, int64_t w, int64_t height, int64_t width,
                    std::string_view mode) {
  STD_TORCH_CHECK(mode == "bilinear" || mode == "nearest", op,
                  ": mode must be 'bilinear' or 'nearest', got '", mode, "'");
  STD_TORCH_CHECK(h > 0 && w > 0, op, ": sources must have sides of at least 1, got ", h, " x ", w);
  if (h == height && w == width)
    return Kind::identity;
  if (h > height || w > width) {
    STD_TORCH_CHECK(h % height == 0 && w % width == 0, op, ": sources must be no larger than ",
                    height, " x ", width, " or larger by whole factors in both sides, got ", h,
                    " x ", w);
    return Kind::area;
  }
  return mode == "bilinear" ? Kind::bilinear : Kind::nearest;
}

/// Planes in groups of at most `most` channels where those lie side by side, else one by one.
inline PlaneGroups groups_of(const Maps &maps, int64_t channels, int64_t most) {
  const bool are_side_by_side = maps.stride_c == 1 && maps.stride_w != 1;
  return {channels, are_side_by_side ? std::clamp<int64_t>(channels, 1, most) : 1};
}

/// The term that is added to x: alpha * sum of the resampled sources.
struct Addends {
  const TensorList &sources, &scales, &shifts;
  double alpha;
  const std::string &mode;
  std::optional<double> lattice;
};

/// Checks the arguments and computes y = x + addends; y may be x.
void resample_add_into(const char *op, const Tensor &x, const Tensor &y, const Addends &addends);

/// Checks the arguments and fills every result with alpha * transpose(R)(grad).
void resample_adjoint_into(const char *op, const Tensor &grad, const TensorList &results,
                           double alpha, const std::string &mode);

} // namespace revbifpn
