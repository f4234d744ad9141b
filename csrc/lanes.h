// Vectors of LANES neighbours in memory.

// Keeps a loop over all lanes from being unrolled before it is vectorised, which would convert the
// lanes one by one.
#define REVBIFPN_LANES _Pragma("GCC unroll 1") for (int64_t lane = 0; lane < LANES; ++lane)

template <class Element, int COUNT> struct VectorOf {
  typedef Element Type __attribute__((vector_size(COUNT * sizeof(Element))));
};
template <class Element> using lane_vector = typename VectorOf<Element, LANES>::Type;
using LaneHalves = lane_vector<uint16_t>;
using LaneWords = lane_vector<uint32_t>;

/// `widen` for whole vectors: a loop over an array takes the vectoriser's code twice as long.
REVBIFPN_INLINE lane_vector<float> load_lanes_whole(const BFloat16 *values) {
  LaneHalves halves;
  __builtin_memcpy(&halves, values, sizeof(halves));
  const LaneWords words = __builtin_convertvector(halves, LaneWords) << 16;
  lane_vector<float> vector;
  __builtin_memcpy(&vector, &words, sizeof(vector));
  return vector;
}

REVBIFPN_INLINE void store_lanes_whole(const lane_vector<float> &vector, BFloat16 *values) {
  LaneWords bits;
  __builtin_memcpy(&bits, &vector, sizeof(bits));
  const LaneWords nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const LaneWords words =
      (bits & 0x7fffffffu) > 0x7f800000u ? LaneWords{} + 0x7fc0u : nearest_even; // NaN stays
  const LaneHalves halves = __builtin_convertvector(words, LaneHalves);
  __builtin_memcpy(values, &halves, sizeof(halves));
}

/// The first `lanes` values; the other lanes are zeros.
template <class T>
REVBIFPN_INLINE lane_vector<accumulator_t<T>> load_lanes(const T *values, int64_t lanes = LANES) {
  using Acc = accumulator_t<T>;
  lane_vector<Acc> vector;
  if (std::is_same_v<T, Acc> && lanes == LANES) {
    __builtin_memcpy(&vector, values, sizeof(vector));
    return vector;
  }
  if constexpr (std::is_same_v<T, BFloat16>)
    if (lanes == LANES)
      return load_lanes_whole(values);
  Acc wide[LANES] = {};
  if (lanes == LANES)
    REVBIFPN_LANES wide[lane] = widen(values[lane]);
  else
    for (int64_t lane = 0; lane < lanes; ++lane)
      wide[lane] = widen(values[lane]);
  __builtin_memcpy(&vector, wide, sizeof(vector));
  return vector;
}

template <class T>
REVBIFPN_INLINE void store_lanes(const lane_vector<accumulator_t<T>> &vector, T *values,
                                 int64_t lanes = LANES) {
  using Acc = accumulator_t<T>;
  if (std::is_same_v<T, Acc> && lanes == LANES) {
    __builtin_memcpy(values, &vector, sizeof(vector));
    return;
  }
  if constexpr (std::is_same_v<T, BFloat16>)
    if (lanes == LANES)
      return store_lanes_whole(vector, values);
  Acc wide[LANES];
  __builtin_memcpy(wide, &vector, sizeof(vector));
  if (lanes == LANES)
    REVBIFPN_LANES values[lane] = narrow<T>(wide[lane]);
  else
    for (int64_t lane = 0; lane < lanes; ++lane)
      values[lane] = narrow<T>(wide[lane]);
}

/// `value` in all lanes.
template <class Vector> REVBIFPN_INLINE Vector splat(double value) {
  using Acc = std::remove_cvref_t<decltype(Vector{}[0])>;
  return Vector{} + static_cast<Acc>(value);
}
