// What Arm64's NEON has and the language has not.

REVBIFPN_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
REVBIFPN_INLINE Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return vfmaq_f64(c, a, b); }
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// A NaN stays.
REVBIFPN_INLINE Floats maximum(Floats a, Floats b) { return vmaxq_f32(a, b); }
REVBIFPN_INLINE Floats minimum(Floats a, Floats b) { return vminq_f32(a, b); }
REVBIFPN_INLINE Doubles maximum(Doubles a, Doubles b) { return vmaxq_f64(a, b); }
REVBIFPN_INLINE Doubles minimum(Doubles a, Doubles b) { return vminq_f64(a, b); }

/// `words`, all ones where the value is NaN.
REVBIFPN_INLINE Words put_nan(Words words, Floats values) {
  return words | ~(Words)vceqq_f32(values, values);
}

REVBIFPN_INLINE Words load_words(const uint16_t *values) {
  return (Words)vmovl_u16(vld1_u16(values));
}
REVBIFPN_INLINE void store_words(Words words, uint16_t *values) {
  vst1_u16(values, vmovn_u32((uint32x4_t)words));
}
REVBIFPN_INLINE void store_words(Words first, Words second, uint16_t *values) {
  store_words(first, values);
  store_words(second, values + 4);
}

REVBIFPN_INLINE Floats load_vector(const Half *values) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t *>(values))));
}
REVBIFPN_INLINE void store_vector(Floats vector, Half *values) {
  vst1_u16(reinterpret_cast<uint16_t *>(values), vreinterpret_u16_f16(vcvt_f16_f32(vector)));
}

/// The first or the second lanes in double precision.
REVBIFPN_INLINE Doubles first_half(Floats v) {
  return (Doubles)vcvt_f64_f32(vget_low_f32((float32x4_t)v));
}
REVBIFPN_INLINE Doubles second_half(Floats v) { return (Doubles)vcvt_high_f64_f32((float32x4_t)v); }
