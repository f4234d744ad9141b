// The kernels, each compiled once for each instruction set into a namespace of its name. They do
// the units of work [begin, end) of a job; `workspace` has job.workspace_size() elements, zeros at
// first.

#pragma once

// All that the kernels use of the library: see instantiate.h.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../conv/job.h"
#include "../norm_act/job.h"
#include "../resample/job.h"
#include "../squeeze_excite/job.h"

// DO(kernel, job, element of the workspace, T) for the kernels of maps with elements of type T ...
#define REVBIFPN_FOR_MAP_KERNELS(DO, T)                                                            \
  DO(add_units, AddJob, accumulator_t<T>, T)                                                       \
  DO(adjoint_units, AdjointJob, accumulator_t<T>, T)                                               \
  DO(depthwise_weight_units, DepthwiseWeightJob, accumulator_t<T>, T)                              \
  DO(depthwise_input_units, DepthwiseInputJob, accumulator_t<T>, T)                                \
  DO(statistics_units, NormJob, double, T)                                                         \
  DO(means_units, NormJob, double, T)                                                              \
  DO(norm_act_units, NormJob, double, T)                                                           \
  DO(plain_sums_units, NormJob, double, T)                                                         \
  DO(gated_sums_units, NormJob, double, T)                                                         \
  DO(norm_grad_units, NormJob, double, T)

// ... and of values of type T, float or double.
#define REVBIFPN_FOR_VALUE_KERNELS(DO, T)                                                          \
  DO(product_units, ProductJob, accumulator_t<T>, T)                                               \
  DO(dots_units, ProductJob, accumulator_t<T>, T)                                                  \
  DO(act_units, ActJob, accumulator_t<T>, T)

#define REVBIFPN_DECLARE_KERNEL(name, Job, Element, T)                                             \
  template <class T>                                                                               \
  void name(const Job<accumulator_t<T>> &job, int64_t begin, int64_t end, Element *workspace);
#define REVBIFPN_DECLARE_KERNELS(isa)                                                              \
  namespace revbifpn::isa {                                                                        \
  REVBIFPN_FOR_MAP_KERNELS(REVBIFPN_DECLARE_KERNEL, T)                                             \
  REVBIFPN_FOR_VALUE_KERNELS(REVBIFPN_DECLARE_KERNEL, T)                                           \
  }
REVBIFPN_DECLARE_KERNELS(baseline)
#ifdef __x86_64__
REVBIFPN_DECLARE_KERNELS(avx2)
REVBIFPN_DECLARE_KERNELS(avx512)
#endif
