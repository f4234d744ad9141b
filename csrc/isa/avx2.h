// What AVX2, FMA and F16C have and the language has not.

REVBIFPN_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm256_fmadd_ps(a, b, c);
}
REVBIFPN_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
  return _mm256_fmadd_pd(a, b, c);
}
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// A NaN in the second argument stays.
REVBIFPN_INLINE Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
REVBIFPN_INLINE Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
REVBIFPN_INLINE Doubles maximum(Doubles a, Doubles b) { return _mm256_max_pd(a, b); }
REVBIFPN_INLINE Doubles minimum(Doubles a, Doubles b) { return _mm256_min_pd(a, b); }

/// `words`, all ones where the value is NaN.
REVBIFPN_INLINE Words put_nan(Words words, Floats values) {
  return words | (Words)_mm256_cmp_ps(values, values, _CMP_UNORD_Q);
}

REVBIFPN_INLINE Words load_words(const uint16_t *values) {
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(values)));
}
REVBIFPN_INLINE void store_words(Words words, uint16_t *values) {
  const __m256i both = (__m256i)words;
  _mm_storeu_si128(
      reinterpret_cast<__m128i *>(values),
      _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
}
REVBIFPN_INLINE void store_words(Words first, Words second, uint16_t *values) {
  const __m256i packed = _mm256_packus_epi32((__m256i)first, (__m256i)second);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(values),
                      _mm256_permute4x64_epi64(packed, 0b11011000));
}

REVBIFPN_INLINE Floats load_vector(const Half *values) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(values)));
}
REVBIFPN_INLINE void store_vector(Floats vector, Half *values) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(values),
                   _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
}

/// The first or the second lanes in double precision.
REVBIFPN_INLINE Doubles first_half(Floats v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
REVBIFPN_INLINE Doubles second_half(Floats v) {
  return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
}
