// What the operators (which know tensors) and the kernels (which know rows) share: maps in memory,
// the taps of a resampling, and the jobs handed to the kernels. Plain C++, no PyTorch.

#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

namespace revbifpn {

constexpr int MAX_SOURCES = 8;

// Elements behind a row of the workspace that a loop over whole vectors of 16 may touch: enlarging
// by 8 writes 8 rows of them.
constexpr int64_t PADDING = 16 * 8;

// Elements of a run: narrow rows go through the steps of a kernel together.
constexpr int64_t RUN_SIZE = 1024;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Dtype { float64, float32, bfloat16, float16 };

/// What sums are kept in.
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

enum class Kind { identity, bilinear, nearest, area };

/// Where the outputs along one side come from: output i is
/// weight_first[i] * in[first[i]] + weight_second[i] * in[second[i]].
/// Only bilinear has weights and a second; for area, `first` is the number of the block.
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

/// How the planes (n, c) are grouped: `lane_block` channels that sit side by side in memory are
/// handled together (channels_last), or one plane at a time (every other layout: lane_block is 1).
struct Lanes {
  int64_t channels, lane_block;

  int64_t blocks() const { return (channels + lane_block - 1) / lane_block; }
};

template <class Acc> struct Source {
  Maps maps;
  const Acc *scale, *shift; // of plane (n, c) at n * channels + c; or null: as it is
  Kind kind;
  int64_t block_h, block_w; // area: the sides of the block that is averaged
  int64_t enlarge_w;        // bilinear: width of the target / width, where whole; else 0
  Taps<Acc> rows, columns;
  int64_t ring_rows; // resampled rows that are kept: a power of two
};

/// y = x + alpha * sum of the resampled sources. A unit of work is one (group of planes, chunk of
/// rows, strip of columns); strips keep the rows in use in the caches near the core.
template <class Acc> struct AddJob {
  Maps x, y;
  std::vector<Source<Acc>> sources;
  Acc alpha;
  Acc snap; // 2^(digits - 1) * lattice, or 0: see `snap_to_lattice`
  Lanes lanes;
  int64_t chunk_rows, row_chunks, strip_columns, strips;
  int64_t run_rows;
  // Elements in the workspace, PADDING included: of a resampled row, a run of them, a run of a
  // source.
  int64_t strip_size, run_size, scratch_size;
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
  Maps grad;
  std::vector<Result<Acc>> results;
  Lanes lanes;
  int64_t row_chunks;
  int64_t run_rows;  // a power of two
  int64_t ring_rows; // rows of grad that are kept: a power of two
  // Elements in the workspace, PADDING included: of all kept rows, a run of them, a run of a
  // result.
  int64_t ring_size, run_size, finished_size;
};

/// sums[n, c, i, j] = sum over pixels (h, w) of grad[n, c, h, w] times
/// x[n, c, h * stride + i - padding, w * stride + j - padding]. A unit of work is one (image, block
/// of channels, row i of the kernel); the channels of a pixel lie side by side.
template <class Acc> struct DepthwiseJob {
  static constexpr int64_t LANES = 16;

  Maps x, grad;
  Acc *sums;
  int64_t channels, kernel_size, stride, padding;

  int64_t blocks() const { return (channels + LANES - 1) / LANES; }
  Acc &tap(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return sums[((n * channels + c) * kernel_size + i) * kernel_size + j];
  }
};

template <class Acc> int64_t workspace_size(const DepthwiseJob<Acc> &) { return 0; }

/// The gradient of a depthwise convolution's input: result[n, c, h, w] is the sum of
/// grad[n, c, (h + padding - i) / stride, (w + padding - j) / stride] * weight[c, i, j] over the
/// taps where both divide. A unit of work is a row of the result; channels lie side by side.
template <class Acc> struct DepthwiseInputJob {
  Maps result, grad;
  const void *weights; // (C, kernel_size, kernel_size), of grad's type
  int64_t channels, kernel_size, stride, padding;

  int64_t taps() const { return kernel_size * kernel_size; }
};

template <class Acc> int64_t workspace_size(const DepthwiseInputJob<Acc> &job) {
  return job.taps() * job.channels; // the weights again, (taps, C)
}

template <class Acc> int64_t workspace_size(const AddJob<Acc> &job) {
  int64_t size = 2 * job.run_size + job.scratch_size;
  for (const auto &source : job.sources)
    size += source.ring_rows * job.strip_size;
  return size;
}

template <class Acc> int64_t workspace_size(const AdjointJob<Acc> &job) {
  const int64_t results = static_cast<int64_t>(job.results.size());
  return job.ring_size + job.run_size + results * job.finished_size;
}

// The kernels, compiled from kernels/*.h once for each instruction set. They do the units
// [begin, end); `workspace` has workspace_size(job) elements, zeros at first.
#define REVBIFPN_DECLARE_KERNELS(isa)                                                              \
  namespace isa {                                                                                  \
  template <class T>                                                                               \
  void add_units(const AddJob<accumulator_t<T>> &job, int64_t begin, int64_t end,                  \
                 accumulator_t<T> *workspace);                                                     \
  template <class T>                                                                               \
  void adjoint_units(const AdjointJob<accumulator_t<T>> &job, int64_t begin, int64_t end,          \
                     accumulator_t<T> *workspace);                                                 \
  template <class T>                                                                               \
  void depthwise_units(const DepthwiseJob<accumulator_t<T>> &job, int64_t begin, int64_t end,      \
                       accumulator_t<T> *workspace);                                               \
  template <class T>                                                                               \
  void depthwise_input_units(const DepthwiseInputJob<accumulator_t<T>> &job, int64_t begin,        \
                             int64_t end, accumulator_t<T> *workspace);                            \
  }
REVBIFPN_DECLARE_KERNELS(baseline)
#ifdef __x86_64__
REVBIFPN_DECLARE_KERNELS(avx2)
REVBIFPN_DECLARE_KERNELS(avx512)
#endif

} // namespace revbifpn
