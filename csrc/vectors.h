// Vectors in memory: elements of any type are loaded as numbers and stored with one rounding.

REVBIFPN_INLINE Floats load_vector(const float *values) {
  Floats vector;
  __builtin_memcpy(&vector, values, sizeof(vector));
  return vector;
}
REVBIFPN_INLINE Doubles load_vector(const double *values) {
  Doubles vector;
  __builtin_memcpy(&vector, values, sizeof(vector));
  return vector;
}
REVBIFPN_INLINE Floats load_vector(const BFloat16 *values) {
  return std::bit_cast<Floats>(load_words(reinterpret_cast<const uint16_t *>(values)) << 16);
}

REVBIFPN_INLINE void store_vector(Floats vector, float *values) {
  __builtin_memcpy(values, &vector, sizeof(vector));
}
REVBIFPN_INLINE void store_vector(Doubles vector, double *values) {
  __builtin_memcpy(values, &vector, sizeof(vector));
}
REVBIFPN_INLINE void store_vector(Floats vector, BFloat16 *values) {
  store_words(bfloat16_of(vector), reinterpret_cast<uint16_t *>(values));
}

/// Two vectors side by side, which bfloat16 stores at less cost than one by one.
template <class Vector, class T>
REVBIFPN_INLINE void store_two_vectors(Vector first, Vector second, T *values) {
  store_vector(first, values);
  store_vector(second, values + WIDTH<accumulator_t<T>>);
}
REVBIFPN_INLINE void store_two_vectors(Floats first, Floats second, BFloat16 *values) {
  store_words(bfloat16_of(first), bfloat16_of(second), reinterpret_cast<uint16_t *>(values));
}

/// The first `count` values; the other lanes are zeros.
template <class T>
REVBIFPN_INLINE vector_of<accumulator_t<T>> load_first(const T *values, int64_t count) {
  T copied[WIDTH<accumulator_t<T>>] = {};
  for (int64_t lane = 0; lane < count; ++lane)
    copied[lane] = values[lane];
  return load_vector(copied);
}

template <class T>
REVBIFPN_INLINE void store_first(vector_of<accumulator_t<T>> vector, T *values, int64_t count) {
  T copied[WIDTH<accumulator_t<T>>];
  store_vector(vector, copied);
  for (int64_t lane = 0; lane < count; ++lane)
    values[lane] = copied[lane];
}

/// All lanes where `count` is a constant that says so, else the first ones.
template <class T>
REVBIFPN_INLINE vector_of<accumulator_t<T>> load_lanes(const T *values, int64_t count) {
  return count == WIDTH<accumulator_t<T>> ? load_vector(values) : load_first(values, count);
}

template <class T>
REVBIFPN_INLINE void store_lanes(vector_of<accumulator_t<T>> vector, T *values, int64_t count) {
  if (count == WIDTH<accumulator_t<T>>)
    store_vector(vector, values);
  else
    store_first(vector, values, count);
}

/// `value` in all lanes.
template <class Vector> REVBIFPN_INLINE Vector splat(double value) {
  using Number = std::remove_cvref_t<decltype(Vector{}[0])>;
  return static_cast<Number>(value) - Vector{};
}
