// How the operators run kernels: for the best instruction set, on all threads.

#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "isa/kernels.h"

namespace revbifpn {

enum class Isa { baseline, avx2, avx512 };

/// The best instruction set of this machine; the environment variable REVBIFPN_ISA = baseline, avx2
/// or avx512 lowers it (read once), for tests and benchmarks. AVX2 and AVX-512 give the same bits.
inline Isa best_isa() {
  static const Isa isa = [] {
    Isa best = Isa::baseline;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
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
    const Isa most = name == "baseline" ? Isa::baseline : name == "avx2" ? Isa::avx2 : Isa::avx512;
    return std::min(best, most);
  }();
  return isa;
}

#if defined(REVBIFPN_ONLY_AVX2) // as the sanitized build is; other machines refuse
#define REVBIFPN_BEST_KERNEL(name, T)                                                              \
  (best_isa() >= Isa::avx2 ? avx2::name<T> : throw std::runtime_error("needs AVX2"))
#elif defined(__x86_64__)
#define REVBIFPN_BEST_KERNEL(name, T)                                                              \
  (best_isa() == Isa::avx512 ? avx512::name<T>                                                     \
   : best_isa() == Isa::avx2 ? avx2::name<T>                                                       \
                             : baseline::name<T>)
#else
#define REVBIFPN_BEST_KERNEL(name, T) (best_isa(), baseline::name<T>)
#endif

/// The memory of a new tensor that the units of work fill from begin to end.
struct FreshMemory {
  uintptr_t begin = 0, bytes = 0;

  explicit FreshMemory(const torch::stable::Tensor &tensor)
      : begin(reinterpret_cast<uintptr_t>(tensor.data_ptr())),
        bytes(tensor.numel() * tensor.element_size()) {}

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

/// Runs `kernel` over the job's units, which are of about the same size and have `elements` in all,
/// on all threads, each with a workspace of its own. Pages of fresh memory are mapped between
/// `step` units; 0 stands for 2^18 elements. Ranges of less than 2^15 are not worth a thread.
template <class Job>
void run_units(const Job &job, int64_t units, int64_t elements,
               void (*kernel)(const Job &, int64_t, int64_t, typename Job::Workspace *),
               const std::vector<FreshMemory> &fresh = {}, int64_t step = 0) {
  if (units == 0)
    return;
  if (step == 0)
    step = fresh.empty()
               ? units
               : std::max<int64_t>(1, units * (int64_t{1} << 18) / std::max<int64_t>(1, elements));
  const int64_t elements_per_unit = std::max<int64_t>(1, elements / units);
  const int64_t grain = ceil_div(int64_t{1} << 15, elements_per_unit);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    // Zeros, because what lies in the padding takes part in arithmetic.
    const auto workspace = std::make_unique<typename Job::Workspace[]>(job.workspace_size());
    for (int64_t unit = begin; unit < end; unit += step) {
      const int64_t unit_end = std::min(unit + step, end);
      for (const FreshMemory &memory : fresh)
        memory.map_pages(unit, unit_end, units);
      kernel(job, unit, unit_end, workspace.get());
    }
  });
}

} // namespace revbifpn
