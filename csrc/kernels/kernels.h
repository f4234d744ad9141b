// All kernels for the instruction set REVBIFPN_ISA (a namespace) with vectors of REVBIFPN_REGISTER
// bytes, included once by each isa_*.cpp, which has included every library header before: an inline
// function of the standard library that is compiled here could replace its copy elsewhere and stop
// programs on older machines.

namespace revbifpn::REVBIFPN_ISA {

#include "elements.h"
#include "lanes.h"
#include "rows.h"
#include "columns.h"

#include "add.h"
#include "adjoint.h"
#include "depthwise.h"

#include "activations.h"
#include "norm_act.h"
#include "squeeze_excite.h"

#define REVBIFPN_INSTANTIATE_NORM(name, T)                                                         \
  template void name<T>(const NormJob<accumulator_t<T>> &, int64_t, int64_t, double *);
#define REVBIFPN_INSTANTIATE(T)                                                                    \
  template void add_units<T>(const AddJob<accumulator_t<T>> &, int64_t, int64_t,                   \
                             accumulator_t<T> *);                                                  \
  template void adjoint_units<T>(const AdjointJob<accumulator_t<T>> &, int64_t, int64_t,           \
                                 accumulator_t<T> *);                                              \
  template void depthwise_units<T>(const DepthwiseJob<accumulator_t<T>> &, int64_t, int64_t,       \
                                   accumulator_t<T> *);                                            \
  template void depthwise_input_units<T>(const DepthwiseInputJob<accumulator_t<T>> &, int64_t,     \
                                         int64_t, accumulator_t<T> *);                             \
  REVBIFPN_INSTANTIATE_NORM(statistics_units, T)                                                   \
  REVBIFPN_INSTANTIATE_NORM(means_units, T)                                                        \
  REVBIFPN_INSTANTIATE_NORM(norm_act_units, T)                                                     \
  REVBIFPN_INSTANTIATE_NORM(plain_sums_units, T)                                                   \
  REVBIFPN_INSTANTIATE_NORM(gated_sums_units, T)                                                   \
  REVBIFPN_INSTANTIATE_NORM(norm_grad_units, T)
REVBIFPN_INSTANTIATE(double)
REVBIFPN_INSTANTIATE(float)
REVBIFPN_INSTANTIATE(BFloat16)
REVBIFPN_INSTANTIATE(Half)

#define REVBIFPN_INSTANTIATE_PRODUCTS(Acc)                                                         \
  template void product_units<Acc>(const ProductJob<Acc> &, int64_t, int64_t, Acc *);              \
  template void dots_units<Acc>(const ProductJob<Acc> &, int64_t, int64_t, Acc *);                 \
  template void act_values<Acc>(const ActJob<Acc> &, int64_t, int64_t);
REVBIFPN_INSTANTIATE_PRODUCTS(double)
REVBIFPN_INSTANTIATE_PRODUCTS(float)

} // namespace revbifpn::REVBIFPN_ISA
