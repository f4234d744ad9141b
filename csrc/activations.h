// Activations and their slopes, on vectors. NaN comes out as NaN. Selects are of a
// vector and zero, where AVX2 takes a third of the time.

template <class Vector> REVBIFPN_INLINE Vector clamp(Vector z, double low, double high) {
  return minimum(splat<Vector>(high), maximum(splat<Vector>(low), z));
}

template <class Vector> REVBIFPN_INLINE Vector magnitude_of(Vector z) {
  using Bits = bits_of<Vector>;
  return std::bit_cast<Vector>(std::bit_cast<Bits>(z) & ~std::bit_cast<Bits>(-Vector{}));
}

/// e^x for |x| <= 87: 2^k * e^r with |r| <= ln(2) / 2, a polynomial.
REVBIFPN_INLINE Floats exp_of(Floats x) {
  const auto all = [](float value) { return splat<Floats>(value); };
  // Adding it rounds to a whole number, which stands in the last bits of the sum.
  const Floats shift = all(0x1.8p23f), shifted = multiply_add(x, all(1.44269504f), shift);
  const Floats k = shifted - shift;
  const Floats r = multiply_add(k, all(2.12194440e-4f), multiply_add(k, all(-0.693359375f), x));
  Floats p = multiply_add(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
  p = multiply_add(p, r, all(8.3334519073e-3f));
  p = multiply_add(p, r, all(4.1665795894e-2f));
  p = multiply_add(p, r, all(1.6666665459e-1f));
  p = multiply_add(p, r, all(5.0000001201e-1f));
  p = multiply_add(p * r, r, r) + 1.0f;
  return p * std::bit_cast<Floats>((std::bit_cast<Words>(shifted) + 127u) << 23);
}

REVBIFPN_INLINE Doubles exp_of(Doubles x) {
  for (int lane = 0; lane < WIDTH<double>; ++lane)
    x[lane] = std::exp(x[lane]);
  return x;
}

template <class Vector> REVBIFPN_INLINE Vector sigmoid(Vector z) {
  const Vector one = splat<Vector>(1);
  return one / (one + exp_of(clamp(-z, -87, 87)));
}

/// An activation's value and slope, which share what they are computed from.
template <class Vector> struct Activated {
  Vector value, slope;
};

template <Act ACT, class Vector> REVBIFPN_INLINE Activated<Vector> activate(Vector z) {
  const Vector zero = {}, one = splat<Vector>(1);
  if constexpr (ACT == Act::relu) {
    return {z < zero ? zero : z, z <= zero ? zero : one};
  } else if constexpr (ACT == Act::hardswish) {
    const Vector sixth = splat<Vector>(1.0 / 6);
    const Vector gate = clamp(multiply_add(z, sixth, splat<Vector>(0.5)), 0, 1);
    return {z * gate, gate + (magnitude_of(z) < splat<Vector>(3) ? z * sixth : zero)};
  } else if constexpr (ACT == Act::silu) {
    const Vector gate = sigmoid(z);
    return {z * gate, gate * multiply_add(z, one - gate, one)};
  } else
    return {z, one};
}

/// Calls `function` with `act` as its template argument.
template <class Function> REVBIFPN_INLINE void with_act(Act act, const Function &function) {
  with_constant<0, 1, 2, 3>(static_cast<int64_t>(act),
                            [&]<int ACT>() { function.template operator()<Act{ACT}>(); });
}
