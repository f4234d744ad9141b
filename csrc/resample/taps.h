// The taps of a resampling along one side, and their transpose.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "job.h"

namespace revbifpn {

/// As PyTorch with align_corners=False: output i lies at (2i + 1) * in / (2 * out) - 1/2 in the
/// source, not below 0. Exact in integers, which step by 2 * in, and rounded once, in the quotient.
/// An equal side takes input i twice, as PyTorch does on CPUs, so that an infinity does not reach
/// its neighbour as NaN.
template <class Acc> Taps<Acc> bilinear_taps(int64_t in, int64_t out) {
  Taps<Acc> taps;
  taps.first.resize(out), taps.second.resize(out);
  taps.weight_first.resize(out), taps.weight_second.resize(out);
  const int64_t whole = 2 * out;
  int64_t first = 0, rest = in - out;
  for (int64_t i = 0; i < out; ++i, rest += 2 * in) {
    for (; rest >= whole; rest -= whole)
      ++first;
    const double fraction =
        static_cast<double>(std::max<int64_t>(rest, 0)) / static_cast<double>(whole);
    taps.first[i] = static_cast<int32_t>(first);
    taps.second[i] = static_cast<int32_t>(in == out ? first : std::min(first + 1, in - 1));
    taps.weight_second[i] = static_cast<Acc>(fraction);
    taps.weight_first[i] = Acc(1) - taps.weight_second[i];
  }
  return taps;
}

/// PyTorch's rule, with its rounding in float32.
template <class Acc> Taps<Acc> nearest_taps(int64_t in, int64_t out) {
  Taps<Acc> taps;
  taps.first.resize(out);
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  for (int64_t i = 0; i < out; ++i) {
    int64_t index =
        std::min(static_cast<int64_t>(std::floor(static_cast<float>(i) * scale)), in - 1);
    if (out == in || out == 2 * in)
      index = i * in / out;
    taps.first[i] = static_cast<int32_t>(index);
  }
  return taps;
}

template <class Acc> Taps<Acc> taps_of(Kind kind, int64_t in, int64_t out) {
  if (kind == Kind::bilinear)
    return bilinear_taps<Acc>(in, out);
  return nearest_taps<Acc>(kind == Kind::nearest ? in : out, out);
}

/// The factor by which bilinear enlarges `in` to `out` if it is whole, else 0.
inline int64_t whole_factor(Kind kind, int64_t in, int64_t out) {
  return kind == Kind::bilinear && out % in == 0 ? out / in : 0;
}

/// The transpose of `taps`. Terms of weight 0 are left out; the outputs that an input gathers from
/// are neighbours, because `first` and `second` never decrease.
template <class Acc> Gather<Acc> transpose(const Taps<Acc> &taps, int64_t in, int64_t out) {
  Gather<Acc> gather;
  gather.begin.assign(in, 0);
  gather.offset.assign(in + 1, 0);
  const bool is_blended = !taps.second.empty();
  int64_t scan = 0;
  for (int64_t source = 0; source < in; ++source) {
    while (scan < out && (is_blended ? taps.second : taps.first)[scan] < source)
      ++scan;
    bool is_empty = true;
    gather.begin[source] = static_cast<int32_t>(scan);
    for (int64_t i = scan; i < out && taps.first[i] <= source; ++i) {
      Acc weight = is_blended ? Acc(0) : Acc(1);
      if (is_blended && taps.first[i] == source)
        weight += taps.weight_first[i];
      if (is_blended && taps.second[i] == source)
        weight += taps.weight_second[i];
      if (weight == 0)
        continue;
      if (is_empty)
        gather.begin[source] = static_cast<int32_t>(i);
      is_empty = false;
      gather.weights.push_back(weight);
    }
    gather.offset[source + 1] = static_cast<int64_t>(gather.weights.size());
  }
  return gather;
}

/// The transpose of the resampling of `kind` from `in` to `out`, without area's division.
template <class Acc> Gather<Acc> gather_of(Kind kind, int64_t in, int64_t out) {
  if (kind != Kind::area)
    return transpose(taps_of<Acc>(kind, in, out), in, out);
  Gather<Acc> gather;
  gather.begin.resize(in);
  gather.offset.assign(1, 0);
  gather.weights.assign(in, Acc(1));
  for (int64_t source = 0; source < in; ++source) {
    gather.begin[source] = static_cast<int32_t>(source / (in / out));
    gather.offset.push_back(source + 1);
  }
  return gather;
}

} // namespace revbifpn
