// The kernels for any machine of the architecture.

#include "kernels.h"

#ifndef REVBIFPN_ONLY_AVX2
#define REVBIFPN_ISA baseline
#define REVBIFPN_REGISTER 16
#include "instantiate.h"
#endif
