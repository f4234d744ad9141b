// What the operators share: checks that protect memory, tensors as plain maps, the choice of dtype
// and instruction set, and the loop over units of work.

#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "resample.h"

namespace revbifpn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const char *op, ScalarType type) {
  switch (type) {
  case ScalarType::Double:
    return Dtype::float64;
  case ScalarType::Float:
    return Dtype::float32;
  case ScalarType::BFloat16:
    return Dtype::bfloat16;
  case ScalarType::Half:
    return Dtype::float16;
  default:
    STD_TORCH_CHECK(false, op, ": maps must be float64, float32, bfloat16 or float16");
  }
}

inline Maps maps_of(const char *op, const Tensor &tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": maps must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 4, op, ": maps must have shape (N, C, H, W), got ", tensor.dim(),
                  " dimensions");
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  STD_TORCH_CHECK(sizes[2] > 0 && sizes[3] > 0, op, ": maps must have sides of at least 1, got ",
                  sizes[2], " x ", sizes[3]);
  STD_TORCH_CHECK(std::max(sizes[2], sizes[3]) < INT32_MAX, op,
                  ": maps must have sides below 2^31");
  return {tensor.data_ptr(), dtype_of(op, tensor.scalar_type()),
          sizes[2],          sizes[3],
          strides[0],        strides[1],
          strides[2],        strides[3]};
}

inline void check_same_planes(const char *op, const Tensor &x, const Tensor &other) {
  STD_TORCH_CHECK(x.size(0) == other.size(0) && x.size(1) == other.size(1), op,
                  ": maps must share (N, C) = (", x.size(0), ", ", x.size(1), "), got (",
                  other.size(0), ", ", other.size(1), ")");
}

/// Raises unless `other`, the argument `name`, is what x is in shape and dtype.
inline void check_like(const char *op, const char *name, const Tensor &other, const char *x_name,
                       const Tensor &x) {
  const Maps maps = maps_of(op, other), x_maps = maps_of(op, x);
  check_same_planes(op, x, other);
  STD_TORCH_CHECK(maps.height == x_maps.height && maps.width == x_maps.width &&
                      maps.dtype == x_maps.dtype,
                  op, ": ", name, " must have ", x_name, "'s shape and dtype");
}

/// Raises unless maps of `dtype` may stand beside an x of `x_dtype`.
inline void check_precision(const char *op, Dtype dtype, Dtype x_dtype) {
  const bool is_half = dtype == Dtype::bfloat16 || dtype == Dtype::float16;
  STD_TORCH_CHECK(dtype == x_dtype || (is_half && x_dtype == Dtype::float32), op,
                  ": sources must have x's dtype, or bfloat16 or float16 beside a float32 x");
}

inline void check_count(const char *op, size_t count) {
  STD_TORCH_CHECK(count >= 1 && count <= MAX_SOURCES, op, ": takes 1 to ", MAX_SOURCES,
                  " sources, got ", count);
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

inline bool is_channels_last(const Tensor &tensor) {
  return tensor.stride(1) == 1 && tensor.stride(3) != 1;
}

/// Calls `function` with a value of the C++ type of `dtype`.
template <class Function> void dispatch_dtype(Dtype dtype, Function &&function) {
  switch (dtype) {
  case Dtype::float64:
    return function(double{});
  case Dtype::float32:
    return function(float{});
  case Dtype::bfloat16:
    return function(BFloat16{});
  case Dtype::float16:
    return function(Half{});
  }
}

inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

enum class Isa { baseline, avx2, avx512 };

/// The best instruction set of this machine; the environment variable REVBIFPN_ISA = baseline, avx2
/// or avx512 lowers it (read once), so that tests can compare them: the results have the same bits.
inline Isa best_isa() {
  static const Isa isa = [] {
    Isa best = Isa::baseline;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
      best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
#endif
    const char *wanted = std::getenv("REVBIFPN_ISA");
    const std::string_view name = wanted == nullptr ? "avx512" : wanted;
    STD_TORCH_CHECK(name == "baseline" || name == "avx2" || name == "avx512",
                    "REVBIFPN_ISA must be baseline, avx2 or avx512, got ", name);
    return std::min(best, name == "baseline" ? Isa::baseline
                          : name == "avx2"   ? Isa::avx2
                                             : Isa::avx512);
  }();
  return isa;
}

#ifdef __x86_64__
#define REVBIFPN_BEST_KERNEL(name, T)                                                              \
  (best_isa() == Isa::avx512 ? avx512::name<T>                                                     \
   : best_isa() == Isa::avx2 ? avx2::name<T>                                                       \
                             : baseline::name<T>)
#else
#define REVBIFPN_BEST_KERNEL(name, T) (baseline::name<T>)
#endif

/// The memory of a new tensor that the units of work fill from begin to end.
struct FreshMemory {
  uintptr_t begin = 0, bytes = 0;

  FreshMemory(const Maps &maps, int64_t elements, int64_t element_size)
      : begin(reinterpret_cast<uintptr_t>(maps.data)), bytes(elements * element_size) {}

  /// Maps the pages of the part [from, to) / whole at once, just before it is written. One call for
  /// 64 pages takes two thirds of the time of 64 page faults (Xeon, Linux 6.18, 2026), which are
  /// most of the time of an operator with large new results. Blocks below 32 MiB are left alone:
  /// glibc may reuse them, pages and all. It is a hint, so errors do not matter.
  void map_pages(int64_t from, int64_t to, int64_t whole) const {
#ifdef MADV_POPULATE_WRITE
    constexpr uintptr_t PAGE = 4096, LARGE = uintptr_t{32} << 20;
    if (bytes < LARGE)
      return;
    const double bytes_per_unit = static_cast<double>(bytes) / static_cast<double>(whole);
    const uintptr_t first =
        begin + static_cast<uintptr_t>(bytes_per_unit * static_cast<double>(from));
    const uintptr_t last = begin + static_cast<uintptr_t>(bytes_per_unit * static_cast<double>(to));
    const uintptr_t first_page = (first + PAGE - 1) / PAGE * PAGE, end = last / PAGE * PAGE;
    if (end > first_page)
      madvise(reinterpret_cast<void *>(first_page), end - first_page, MADV_POPULATE_WRITE);
#endif
  }
};

/// Runs `kernel` over the job's units on all threads, each with a workspace of its own, `step`
/// units at a time between which pages of fresh memory are mapped. Ranges of less than 2^15
/// elements are not worth a thread.
template <class Job, class Acc>
void run_units(const Job &job, int64_t units, int64_t step, int64_t elements,
               const std::vector<FreshMemory> &fresh,
               void (*kernel)(const Job &, int64_t, int64_t, Acc *)) {
  if (units == 0)
    return;
  const int64_t elements_per_unit = std::max<int64_t>(1, elements / units);
  const int64_t grain = ceil_div(int64_t{1} << 15, elements_per_unit);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    // Zeros, because what lies in the padding takes part in arithmetic.
    const auto workspace = std::make_unique<Acc[]>(workspace_size(job));
    for (int64_t unit = begin; unit < end; unit += step) {
      const int64_t unit_end = std::min(unit + step, end);
      for (const FreshMemory &memory : fresh)
        memory.map_pages(unit, unit_end, units);
      kernel(job, unit, unit_end, workspace.get());
    }
  });
}

/// Checks the arguments and computes y = x + alpha * sum of the resampled sources; y may be x.
void resample_add_into(const char *op, const Tensor &x, const Tensor &y,
                       const std::vector<Tensor> &sources, const std::vector<Tensor> &scales,
                       const std::vector<Tensor> &shifts, double alpha, const std::string &mode,
                       std::optional<double> lattice);

/// Checks the arguments and fills every result with alpha * transpose(R)(grad).
void resample_adjoint_into(const char *op, const Tensor &grad, const std::vector<Tensor> &results,
                           double alpha, const std::string &mode);

} // namespace revbifpn
