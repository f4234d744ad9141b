// Resampling as the operators describe it to the kernels: where the values of each output come
// from, and the jobs. Plain C++, no PyTorch.

#pragma once

#include <vector>

#include "../maps.h"

namespace revbifpn {

constexpr int MAX_SOURCES = 8;

// Elements after a row of the workspace that loops over whole vectors may touch; enlarging by 8
// writes 8 vectors at once.
constexpr int64_t PADDING = LANES * 8;

// Elements per run: narrow rows go through a kernel's steps together.
constexpr int64_t RUN_SIZE = 1024;

enum class Kind { identity, bilinear, nearest, area };

/// Where the outputs along one side come from: output i is
/// weight_first[i] * in[first[i]] + weight_second[i] * in[second[i]].
/// Only bilinear has weights and a second.
template <class Acc> struct Taps {
  std::vector<int32_t> first, second;
  std::vector<Acc> weight_first, weight_second;
};

/// The transpose of Taps: input i gathers `weights[offset[i]], ...` times the outputs from begin[i]
/// on, offset[i + 1] - offset[i] of them.
template <class Acc> struct Gather {
  std::vector<int32_t> begin;
  std::vector<int64_t> offset;
  std::vector<Acc> weights;

  int64_t terms(int64_t i) const { return offset[i + 1] - offset[i]; }
  int64_t end(int64_t i) const { return begin[i] + terms(i); }
  const Acc *weights_of(int64_t i) const { return weights.data() + offset[i]; }
};

/// How the planes (n, c) are grouped: `lane_block` channels that lie side by side in memory are
/// handled together (channels_last), or one plane at a time (every other layout: lane_block is 1).
struct PlaneGroups {
  int64_t channels, lane_block;

  int64_t per_image() const { return ceil_div(channels, lane_block); }
};

/// A number per plane, that of (n, c) at n * stride + c; the stride is 0 where images share them.
template <class Acc> struct PlaneFactors {
  const Acc *values; // null: none
  int64_t stride;

  const Acc *of(int64_t n, int64_t c) const { return values + n * stride + c; }
};

template <class Acc> struct Source {
  Maps maps;
  PlaneFactors<Acc> scale, shift;
  Kind kind;
  int64_t block_h, block_w; // area: the sides of the block that is averaged
  int64_t enlarge_w;        // bilinear: width of the target / width, where whole; else 0
  Taps<Acc> rows, columns;  // empty if not enlarged
  int64_t ring_rows;        // resampled rows that stay in the workspace: a power of two

  bool is_enlarged() const { return kind == Kind::bilinear || kind == Kind::nearest; }

  /// The first and the last row, or column, that output i reads; of area, the number of the block.
  int64_t first_of(const Taps<Acc> &taps, int64_t i) const {
    return is_enlarged() ? taps.first[i] : i;
  }
  int64_t last_of(const Taps<Acc> &taps, int64_t i) const {
    return kind == Kind::bilinear ? taps.second[i] : first_of(taps, i);
  }
};

/// y = x + alpha * sum of the resampled sources. A unit of work is one (group of planes, chunk of
/// rows, strip of columns); strips keep the rows in use in the caches near the core.
template <class Acc> struct AddJob {
  using Workspace = Acc;

  Maps x, y;
  std::vector<Source<Acc>> sources;
  Acc alpha;
  Acc snap; // 2^(digits - 1) * lattice, or 0: see `snap_to_lattice`
  PlaneGroups groups;
  int64_t chunk_rows, row_chunks, strip_columns, strips;
  int64_t run_rows;
  // Elements in the workspace, PADDING included: of a resampled row, a run of y, a run of a source.
  int64_t strip_size, staged_size, scratch_size;

  int64_t workspace_size() const {
    int64_t size = PADDING + staged_size + scratch_size; // PADDING to begin at a cache line
    for (const auto &source : sources)
      size += source.ring_rows * strip_size;
    return size;
  }
};

template <class Acc> struct Result {
  Maps maps;
  Acc scale;
  int64_t enlarge_w; // as in Source
  Gather<Acc> rows, columns;
};

/// result_k = scale_k * transpose(R_k)(grad). A unit of work is one (group of planes, chunk of
/// rows) of all results together, so that grad comes from memory once.
template <class Acc> struct AdjointJob {
  using Workspace = Acc;

  Maps grad;
  std::vector<Result<Acc>> results;
  PlaneGroups groups;
  int64_t row_chunks;
  int64_t run_rows;  // a power of two
  int64_t ring_rows; // rows of grad that stay in the workspace: a power of two
  // Elements in the workspace, PADDING included: of the ring, a run of rows of grad, a run of a
  // result.
  int64_t ring_size, run_size, finished_size;

  int64_t workspace_size() const {
    return ring_size + run_size + static_cast<int64_t>(results.size()) * finished_size;
  }
};

} // namespace revbifpn
