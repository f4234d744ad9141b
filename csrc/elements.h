// Conversions and rounding of one element. Integer operations and selects only, so that the
// compiler vectorises the loops around them for every instruction set, with the same bits.

// Asserts that no iteration of the next loop depends on another: x and y may be the same memory.
#if defined(__clang__)
#define REVBIFPN_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define REVBIFPN_INDEPENDENT _Pragma("GCC ivdep")
#endif

// Always inlined, so that constants of the caller shape the function's loops.
#define REVBIFPN_INLINE inline __attribute__((always_inline))

/// Calls `function` with `value` as its template argument and returns true, if it is in VALUES.
template <int... VALUES, class Function>
REVBIFPN_INLINE bool with_constant(int64_t value, const Function &function) {
  return ((value == VALUES && (function.template operator()<VALUES>(), true)) || ...);
}

inline double widen(double value) { return value; }
inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

inline float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t not_finite = (magnitude << 13) + (224u << 23);
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x400u ? subnormal : normal;
  return std::bit_cast<float>((magnitude < 0x7c00u ? finite : not_finite) | sign);
}

template <class T> T narrow(accumulator_t<T> value);

template <> inline double narrow<double>(double value) { return value; }
template <> inline float narrow<float>(float value) { return value; }

template <> inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t to_nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : to_nearest_even)};
}

template <> inline Half narrow<Half>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // A subnormal half counts steps of 2^-24, the last place of 0.5: adding 0.5 rounds to them.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : rounded;
  const uint32_t overflowed = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>((magnitude < 0x47800000u ? finite : overflowed) |
                                (bits >> 16 & 0x8000u))};
}

/// `value` rounded to a multiple of the lattice, ties to even. Above `snap` = 2^(digits - 1) *
/// lattice every number is a multiple already; the last place of snap itself is the lattice, so
/// adding snap to a smaller number rounds it.
template <class Acc> Acc snap_to_lattice(Acc value, Acc snap) {
  using Bits = std::conditional_t<std::is_same_v<Acc, double>, uint64_t, uint32_t>;
  const Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  const Bits bits = std::bit_cast<Bits>(value);
  const Acc magnitude = std::bit_cast<Acc>(bits & ~sign);
  const Bits snapped = std::bit_cast<Bits>((magnitude + snap) - snap) | (bits & sign);
  return std::bit_cast<Acc>(magnitude < snap ? snapped : bits);
}
