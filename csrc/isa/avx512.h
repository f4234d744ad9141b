// What AVX-512 has and the language has not. Not AVX512-BF16: it takes subnormal numbers for zeros.

REVBIFPN_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a, b, c);
}
REVBIFPN_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
  return _mm512_fmadd_pd(a, b, c);
}
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// A NaN in the second argument stays.
REVBIFPN_INLINE Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
REVBIFPN_INLINE Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
REVBIFPN_INLINE Doubles maximum(Doubles a, Doubles b) { return _mm512_max_pd(a, b); }
REVBIFPN_INLINE Doubles minimum(Doubles a, Doubles b) { return _mm512_min_pd(a, b); }

/// `words`, all ones where the value is NaN.
REVBIFPN_INLINE Words put_nan(Words words, Floats values) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return (Words)_mm512_mask_set1_epi32((__m512i)words, is_nan, -1);
}

REVBIFPN_INLINE Words load_words(const uint16_t *values) {
  return (Words)_mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i *>(values)));
}
REVBIFPN_INLINE void store_words(Words words, uint16_t *values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(values), _mm512_cvtepi32_epi16((__m512i)words));
}
REVBIFPN_INLINE void store_words(Words first, Words second, uint16_t *values) {
  const __m512i packed = _mm512_packus_epi32((__m512i)first, (__m512i)second);
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  _mm512_storeu_si512(values, _mm512_permutexvar_epi64(order, packed));
}

REVBIFPN_INLINE Floats load_vector(const Half *values) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(values)));
}
REVBIFPN_INLINE void store_vector(Floats vector, Half *values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(values),
                      _mm512_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
}

/// The first or the second lanes in double precision.
REVBIFPN_INLINE Doubles first_half(Floats v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
REVBIFPN_INLINE Doubles second_half(Floats v) {
  return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
}
