// The kernels for x86-64 machines with AVX-512.

#include "kernels.h"

#if defined(__x86_64__) && !defined(REVBIFPN_ONLY_AVX2)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(                                                                      \
    __attribute__((target("fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // of GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define REVBIFPN_ISA avx512
#define REVBIFPN_REGISTER 64
#define REVBIFPN_INTRINSICS "avx512.h"
#include "instantiate.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
