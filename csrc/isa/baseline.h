// A machine of which nothing is known, such as x86-64 before AVX2: no fused multiply-add, so
// results differ in the last place from those of the other instruction sets, and no half precision.

template <class Number> REVBIFPN_INLINE Number multiply_add(Number a, Number b, Number c) {
  return a * b + c;
}

// A NaN in the second argument stays.
template <class Vector> REVBIFPN_INLINE Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
template <class Vector> REVBIFPN_INLINE Vector minimum(Vector a, Vector b) { return a < b ? a : b; }

/// `words`, all ones where the value is NaN.
REVBIFPN_INLINE Words put_nan(Words words, Floats values) {
  return values == values ? words : ~Words{};
}

REVBIFPN_INLINE Words load_words(const uint16_t *values) {
  return Words{values[0], values[1], values[2], values[3]};
}
REVBIFPN_INLINE void store_words(Words words, uint16_t *values) {
  for (int lane = 0; lane < 4; ++lane)
    values[lane] = static_cast<uint16_t>(words[lane]);
}
REVBIFPN_INLINE void store_words(Words first, Words second, uint16_t *values) {
  store_words(first, values);
  store_words(second, values + 4);
}

REVBIFPN_INLINE Floats load_vector(const Half *values) {
  return float_of_half<Floats>(load_words(reinterpret_cast<const uint16_t *>(values)));
}
REVBIFPN_INLINE void store_vector(Floats vector, Half *values) {
  store_words(half_of(vector), reinterpret_cast<uint16_t *>(values));
}

/// The first or the second lanes in double precision.
REVBIFPN_INLINE Doubles first_half(Floats v) { return Doubles{v[0], v[1]}; }
REVBIFPN_INLINE Doubles second_half(Floats v) { return Doubles{v[2], v[3]}; }
