// The kernels for x86-64 machines with AVX2.

#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define REVBIFPN_ISA avx2
#define REVBIFPN_REGISTER 32
#define REVBIFPN_INTRINSICS "avx2.h"
#include "instantiate.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
