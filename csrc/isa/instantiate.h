// Compiles all kernels for the instruction set REVBIFPN_ISA (a namespace) with vectors of
// REVBIFPN_REGISTER bytes and what REVBIFPN_INTRINSICS defines. Included once by each file of this
// folder, which has included every library header before: an inline function of the standard
// library that is compiled here could replace its copy elsewhere and stop programs on older
// machines.

namespace revbifpn::REVBIFPN_ISA {

#include "../elements.h"
#include REVBIFPN_INTRINSICS
#include "../vectors.h"

#include "../resample/rows.h"
#include "../resample/columns.h"
#include "../resample/add.h"
#include "../resample/adjoint.h"

#include "../conv/depthwise.h"

#include "../activations.h"
#include "../norm_act/steps.h"
#include "../norm_act/walk.h"
#include "../squeeze_excite/products.h"

#define REVBIFPN_INSTANTIATE(name, Job, Element, T)                                                \
  template void name<T>(const Job<accumulator_t<T>> &, int64_t, int64_t, Element *);
REVBIFPN_FOR_MAP_KERNELS(REVBIFPN_INSTANTIATE, double)
REVBIFPN_FOR_MAP_KERNELS(REVBIFPN_INSTANTIATE, float)
REVBIFPN_FOR_MAP_KERNELS(REVBIFPN_INSTANTIATE, BFloat16)
REVBIFPN_FOR_MAP_KERNELS(REVBIFPN_INSTANTIATE, Half)
REVBIFPN_FOR_VALUE_KERNELS(REVBIFPN_INSTANTIATE, double)
REVBIFPN_FOR_VALUE_KERNELS(REVBIFPN_INSTANTIATE, float)

} // namespace revbifpn::REVBIFPN_ISA
