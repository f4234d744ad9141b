// Activations and their slopes, on vectors. NaN comes out as NaN.

/// z / divisor in two products: one would err to the same side everywhere, which adds up in sums.
template <class Vector> REVBIFPN_INLINE Vector divide_lanes(Vector z, double divisor) {
  using Acc = std::remove_cvref_t<decltype(z[0])>;
  const double factor = 1 / divisor, rest = factor - static_cast<Acc>(factor);
  return z * splat<Vector>(factor) + z * splat<Vector>(rest);
}

template <class Vector> REVBIFPN_INLINE Vector clamp_lanes(Vector z, double low, double high) {
  const Vector lows = splat<Vector>(low), highs = splat<Vector>(high);
  z = z < lows ? lows : z;
  return z > highs ? highs : z;
}

/// e^x for |x| <= 87: 2^k * e^r with |r| <= ln(2) / 2, a polynomial.
REVBIFPN_INLINE lane_vector<float> exp_lanes(lane_vector<float> x) {
  using Floats = lane_vector<float>;
  using Integers = lane_vector<int32_t>;
  const Floats scaled = x * 1.44269504f;
  const Floats half = scaled < 0.0f ? splat<Floats>(-0.5) : splat<Floats>(0.5);
  const Integers k = __builtin_convertvector(scaled + half, Integers);
  const Floats whole = __builtin_convertvector(k, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = (k + 127) << 23;
  Floats factor;
  __builtin_memcpy(&factor, &power, sizeof(factor));
  return p * factor;
}

REVBIFPN_INLINE lane_vector<double> exp_lanes(lane_vector<double> x) {
  for (int64_t lane = 0; lane < LANES; ++lane)
    x[lane] = std::exp(x[lane]);
  return x;
}

template <class Vector> REVBIFPN_INLINE Vector sigmoid_lanes(Vector z) {
  const Vector one = splat<Vector>(1);
  const Vector sigmoid = one / (one + exp_lanes(clamp_lanes(-z, -87, 87)));
  return z == z ? sigmoid : z;
}

template <class Vector> REVBIFPN_INLINE Vector act_lanes(Act act, Vector z) {
  switch (act) {
  case Act::relu:
    return z < Vector{} ? Vector{} : z;
  case Act::hardswish:
    return divide_lanes(z * clamp_lanes(z + splat<Vector>(3), 0, 6), 6);
  case Act::silu:
    return z * sigmoid_lanes(z);
  case Act::identity:
    break;
  }
  return z;
}

template <class Vector> REVBIFPN_INLINE Vector slope_lanes(Act act, Vector z) {
  const Vector zero = {}, one = splat<Vector>(1), three = splat<Vector>(3);
  switch (act) {
  case Act::relu:
    return z <= zero ? zero : one;
  case Act::hardswish: {
    const Vector between = divide_lanes(z, 3) + splat<Vector>(0.5);
    return z <= -three ? zero : (z >= three ? one : between);
  }
  case Act::silu: {
    const Vector sigmoid = sigmoid_lanes(z);
    return sigmoid * (one + z * (one - sigmoid));
  }
  case Act::identity:
    break;
  }
  return one;
}
