// Numbers and vectors of numbers that fill one register of the instruction set; conversions of
// their bits, written once for both. A vector wider than a register would be taken apart, in part
// into scalars.

// Asserts that no iteration of the next loop depends on another: x and y may be the same memory.
#if defined(__clang__)
#define REVBIFPN_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define REVBIFPN_INDEPENDENT _Pragma("GCC ivdep")
#endif

// Always inlined, so that constants of the caller shape the function's loops.
#define REVBIFPN_INLINE inline __attribute__((always_inline))

// A loop of a constant, small number of rounds, written out: arrays that it indexes stay in
// registers.
#define REVBIFPN_UNROLLED(index, count)                                                            \
  _Pragma("GCC unroll 16") for (int index = 0; index < (count); ++index)

/// Calls `function` with `value` as its template argument and returns true, if it is in VALUES.
template <int... VALUES, class Function>
REVBIFPN_INLINE bool with_constant(int64_t value, const Function &function) {
  return ((value == VALUES && (function.template operator()<VALUES>(), true)) || ...);
}

/// Elements of a register.
template <class Element> constexpr int WIDTH = REVBIFPN_REGISTER / sizeof(Element);

template <class Element, int COUNT> struct VectorOf {
  typedef Element Type __attribute__((vector_size(COUNT * sizeof(Element))));
};
template <class Element> using vector_of = typename VectorOf<Element, WIDTH<Element>>::Type;
using Floats = vector_of<float>;
using Doubles = vector_of<double>;
using Words = vector_of<uint32_t>;

/// Unsigned integers of the size of a number or a vector.
uint32_t bits_type(float);
uint64_t bits_type(double);
Words bits_type(Floats);
vector_of<uint64_t> bits_type(Doubles);
template <class Number> using bits_of = decltype(bits_type(Number{}));

/// float32 to float16, to nearest even; any NaN becomes the quiet one.
template <class Number> REVBIFPN_INLINE bits_of<Number> half_of(Number value) {
  using Bits = bits_of<Number>;
  const Bits bits = std::bit_cast<Bits>(value), magnitude = bits & 0x7fffffffu;
  const Bits rounded = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // A subnormal half counts steps of 2^-24, the last place of 0.5: adding 0.5 rounds to them.
  const Bits subnormal = std::bit_cast<Bits>(std::bit_cast<Number>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits finite = magnitude < 0x38800000u ? subnormal : rounded;
  const Bits overflowed = value == value ? Bits{} + 0x7c00u : Bits{} + 0x7e00u;
  return (magnitude < 0x47800000u ? finite : overflowed) | (bits >> 16 & 0x8000u);
}

/// float16 to float32.
template <class Number> REVBIFPN_INLINE Number float_of_half(bits_of<Number> half) {
  using Bits = bits_of<Number>;
  const Bits magnitude = (half & 0x7fffu) << 13;
  const Number smallest = std::bit_cast<Number>(Bits{} + (113u << 23)); // normal: 2^-14
  const Bits normal = magnitude + (112u << 23), not_finite = magnitude + (224u << 23);
  const Bits subnormal =
      std::bit_cast<Bits>(std::bit_cast<Number>(magnitude + (113u << 23)) - smallest);
  const Bits finite = magnitude < (0x400u << 13) ? subnormal : normal;
  return std::bit_cast<Number>((magnitude < (0x7c00u << 13) ? finite : not_finite) |
                               (half & 0x8000u) << 16);
}

/// All bits where the comparison holds, else none.
REVBIFPN_INLINE uint32_t lanes_where(bool condition) { return condition ? ~0u : 0u; }
REVBIFPN_INLINE Words lanes_where(vector_of<int32_t> condition) { return (Words)condition; }

/// float32 to bfloat16, to nearest even; any NaN becomes the one with all bits set.
template <class Number> REVBIFPN_INLINE bits_of<Number> bfloat16_of(Number value) {
  using Bits = bits_of<Number>;
  const Bits bits = std::bit_cast<Bits>(value);
  const Bits to_nearest_even = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (to_nearest_even | lanes_where(value != value)) >> 16;
}

inline double widen(double value) { return value; }
inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }
inline float widen(Half value) { return float_of_half<float>(value.bits); }

template <class T> T narrow(accumulator_t<T> value);

template <> inline double narrow<double>(double value) { return value; }
template <> inline float narrow<float>(float value) { return value; }
template <> inline BFloat16 narrow<BFloat16>(float value) {
  return {static_cast<uint16_t>(bfloat16_of(value))};
}
template <> inline Half narrow<Half>(float value) {
  return {static_cast<uint16_t>(half_of(value))};
}

/// `value` rounded to a multiple of the lattice, ties to even. Above `snap` = 2^(digits - 1) *
/// lattice every number is a multiple already; the last place of snap itself is the lattice, so
/// adding snap to a smaller number rounds it.
template <class Number> REVBIFPN_INLINE Number snap_to_lattice(Number value, Number snap) {
  using Bits = bits_of<Number>;
  const Bits bits = std::bit_cast<Bits>(value), sign_bit = std::bit_cast<Bits>(-Number{});
  const Number magnitude = std::bit_cast<Number>(bits & ~sign_bit);
  const Bits snapped = std::bit_cast<Bits>((magnitude + snap) - snap) | (bits & sign_bit);
  return std::bit_cast<Number>(magnitude < snap ? snapped : bits);
}
