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
/// Words whose upper halves are bfloat16.
REVBIFPN_INLINE Words bfloat16_words(Floats vector) {
  return put_nan(rounded_to_bfloat16(std::bit_cast<Words>(vector)), vector);
}
REVBIFPN_INLINE void store_vector(Floats vector, BFloat16 *values) {
  store_words(bfloat16_words(vector) >> 16, reinterpret_cast<uint16_t *>(values));
}

/// Two vectors side by side, which bfloat16 stores at less cost than one by one.
template <class Vector, class T>
REVBIFPN_INLINE void store_two_vectors(Vector first, Vector second, T *values) {
  store_vector(first, values);
  store_vector(second, values + WIDTH<accumulator_t<T>>);
}
REVBIFPN_INLINE void store_two_vectors(Floats first, Floats second, BFloat16 *values) {
  store_words(bfloat16_words(first) >> 16, bfloat16_words(second) >> 16,
              reinterpret_cast<uint16_t *>(values));
}

// A pair of registers, for loops that do not care which lane a value is in. The parts of a pair of
// BFloat16 are its even and its odd values, which lie in a word of 32 bits where a float32 has its
// upper half: so they take one operation instead of two, and none between lanes.

template <class T> REVBIFPN_INLINE auto load_part(const T *pair, int part) {
  return load_vector(pair + part * WIDTH<accumulator_t<T>>);
}
REVBIFPN_INLINE Floats load_part(const BFloat16 *pair, int part) {
  Words words;
  __builtin_memcpy(&words, pair, sizeof(words));
  return std::bit_cast<Floats>(part == 0 ? words << 16 : words & 0xffff0000u);
}

template <class T, class Vector>
REVBIFPN_INLINE void store_pair(Vector first, Vector second, T *pair) {
  store_two_vectors(first, second, pair);
}
REVBIFPN_INLINE void store_pair(Floats first, Floats second, BFloat16 *pair) {
  const Words words = (bfloat16_words(first) >> 16) | (bfloat16_words(second) & 0xffff0000u);
  __builtin_memcpy(pair, &words, sizeof(words));
}

/// The lane, counted through both parts, that value `i` of a pair is in.
template <class T> constexpr int64_t lane_in_pair(int64_t i) {
  return std::is_same_v<T, BFloat16> ? i % 2 * WIDTH<float> + i / 2 : i;
}

/// Copies `count` values, fewer than 2 * MOST, in pieces of constant sizes, which take no call.
template <int MOST, class T> REVBIFPN_INLINE void copy_few(const T *from, int64_t count, T *to) {
  const bool has_piece = (count & MOST) != 0;
  if (has_piece)
    __builtin_memcpy(to, from, MOST * sizeof(T));
  if constexpr (MOST > 1)
    copy_few<MOST / 2>(from + (has_piece ? MOST : 0), count, to + (has_piece ? MOST : 0));
}

/// The first `count` values, fewer than all; the other lanes are zeros.
template <class T>
REVBIFPN_INLINE vector_of<accumulator_t<T>> load_first(const T *values, int64_t count) {
  constexpr int ALL = WIDTH<accumulator_t<T>>;
  T copied[ALL];
  store_vector(vector_of<accumulator_t<T>>{}, copied);
  copy_few<ALL / 2>(values, count, copied);
  return load_vector(copied);
}

template <class T>
REVBIFPN_INLINE void store_first(vector_of<accumulator_t<T>> vector, T *values, int64_t count) {
  constexpr int ALL = WIDTH<accumulator_t<T>>;
  T copied[ALL];
  store_vector(vector, copied);
  copy_few<ALL / 2>(copied, count, values);
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
