// Activations and their slopes, on vectors. NaN comes out as NaN.

/// z / divisor + addend, by two products: one would err to the same side everywhere, which adds up
/// in sums.
template <class Vector>
REVBIFPN_INLINE Vector divide_lanes(Vector z, double divisor, double addend = 0) {
  using Acc = std::remove_cvref_t<decltype(z[0])>;
  const double factor = 1 / divisor, rest = factor - static_cast<Acc>(factor);
  return multiply_add(z, splat<Vector>(factor),
                      multiply_add(z, splat<Vector>(rest), splat<Vector>(addend)));
}

template <class Vector> REVBIFPN_INLINE Vector clamp_lanes(Vector z, double low, double high) {
  const Vector lows = splat<Vector>(low), highs = splat<Vector>(high);
  z = z < lows ? lows : z;
  return z > highs ? highs : z;
}

/// e^x for |x| <= 87: 2^k * e^r with |r| <= ln(2) / 2, a polynomial.
REVBIFPN_INLINE Floats exp_lanes(Floats x) {
  using Integers = vector_of<int32_t>;
  const auto all = [](float value) { return splat<Floats>(value); };
  const Floats scaled = x * 1.44269504f;
  const Integers k =
      __builtin_convertvector(scaled + (scaled < 0.0f ? all(-0.5f) : all(0.5f)), Integers);
  const Floats whole = __builtin_convertvector(k, Floats);
  const Floats r =
      multiply_add(whole, all(2.12194440e-4f), multiply_add(whole, all(-0.693359375f), x));
  Floats p = multiply_add(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
  p = multiply_add(p, r, all(8.3334519073e-3f));
  p = multiply_add(p, r, all(4.1665795894e-2f));
  p = multiply_add(p, r, all(1.6666665459e-1f));
  p = multiply_add(p, r, all(5.0000001201e-1f));
  p = multiply_add(p * r, r, r) + 1.0f;
  return p * std::bit_cast<Floats>((k + 127) << 23);
}

REVBIFPN_INLINE Doubles exp_lanes(Doubles x) {
  for (int lane = 0; lane < WIDTH<double>; ++lane)
    x[lane] = std::exp(x[lane]);
  return x;
}

template <class Vector> REVBIFPN_INLINE Vector sigmoid_lanes(Vector z) {
  const Vector one = splat<Vector>(1);
  const Vector sigmoid = one / (one + exp_lanes(clamp_lanes(-z, -87, 87)));
  return z == z ? sigmoid : z;
}

template <Act ACT, class Vector> REVBIFPN_INLINE Vector act_lanes(Vector z) {
  if constexpr (ACT == Act::relu)
    return z < Vector{} ? Vector{} : z;
  else if constexpr (ACT == Act::hardswish)
    return divide_lanes(z * clamp_lanes(z + splat<Vector>(3), 0, 6), 6);
  else if constexpr (ACT == Act::silu)
    return z * sigmoid_lanes(z);
  else
    return z;
}

template <Act ACT, class Vector> REVBIFPN_INLINE Vector slope_lanes(Vector z) {
  const Vector zero = {}, one = splat<Vector>(1), three = splat<Vector>(3);
  if constexpr (ACT == Act::relu)
    return z <= zero ? zero : one;
  else if constexpr (ACT == Act::hardswish) {
    const Vector between = divide_lanes(z, 3, 0.5);
    return z <= -three ? zero : (z >= three ? one : between);
  } else if constexpr (ACT == Act::silu) {
    const Vector sigmoid = sigmoid_lanes(z);
    return sigmoid * multiply_add(z, one - sigmoid, one);
  } else
    return one;
}

/// Calls `function` with `act` as its template argument.
template <class Function> REVBIFPN_INLINE void with_act(Act act, const Function &function) {
  with_constant<0, 1, 2, 3>(static_cast<int64_t>(act),
                            [&]<int ACT>() { function.template operator()<Act{ACT}>(); });
}
