// The kernels for x86-64 machines with AVX-512.

#include "kernels.h"

#if defined(__x86_64__) && !defined(REVBIFPN_ONLY_AVX2)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("f16c,avx512f,avx512bw,avx512dq,avx512vl"))),   \
                             apply_to = function)
#else
#pragma GCC target("f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#define REVBIFPN_ISA avx512
#define REVBIFPN_REGISTER 64
#include "instantiate.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
