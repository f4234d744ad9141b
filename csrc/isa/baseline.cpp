// The kernels for any machine of the architecture.

#include "kernels.h"

#ifndef REVBIFPN_ONLY_AVX2
#define REVBIFPN_ISA baseline
#define REVBIFPN_REGISTER 16
#ifdef __aarch64__
#include <arm_neon.h>
#define REVBIFPN_INTRINSICS "neon.h"
#else
#define REVBIFPN_INTRINSICS "baseline.h"
#endif
#include "instantiate.h"
#endif
