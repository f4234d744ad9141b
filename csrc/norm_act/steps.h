// Batch norm, activation and gate: the computation of each kernel on one vector. A step either adds
// to its sums or returns the vector that is stored.

/// The values that are constant over a unit of work, for one vector; scale is invstd * weight.
template <class Vector> struct Factors {
  Vector mean, scale, bias, gate, grad_mean, offset, tilt;

  REVBIFPN_INLINE Vector normalised(Vector xc) const { return multiply_add(xc, scale, bias); }
};

/// `mean` is the mean of the unit's first pixels, near enough that the squares lose no digits. The
/// values themselves are summed too: a mean of differences would keep their rounding.
struct Statistics {
  static constexpr int SUMS = 3;
  static constexpr bool READS_GRAD = false;

  template <class Vector>
  REVBIFPN_INLINE static void step(const Factors<Vector> &f, Vector x, Vector, Vector *sums) {
    const Vector xc = x - f.mean;
    sums[0] += xc;
    sums[1] = multiply_add(xc, xc, sums[1]);
    sums[2] += x;
  }
};

template <Act ACT> struct Means {
  static constexpr int SUMS = 1;
  static constexpr bool READS_GRAD = false;

  template <class Vector>
  REVBIFPN_INLINE static void step(const Factors<Vector> &f, Vector x, Vector, Vector *sums) {
    sums[0] += activate<ACT>(f.normalised(x - f.mean)).value;
  }
};

template <Act ACT> struct NormAct {
  static constexpr int SUMS = 0;
  static constexpr bool READS_GRAD = false;

  template <class Vector>
  REVBIFPN_INLINE static Vector step(const Factors<Vector> &f, Vector x, Vector, Vector *) {
    return activate<ACT>(f.normalised(x - f.mean)).value * f.gate;
  }
};

template <Act ACT, bool GATED> struct GradSums {
  static constexpr int SUMS = GATED ? 5 : 2;
  static constexpr bool READS_GRAD = true;

  template <class Vector>
  REVBIFPN_INLINE static void step(const Factors<Vector> &f, Vector x, Vector grad, Vector *sums) {
    const Vector xc = x - f.mean;
    const auto [value, slope] = activate<ACT>(f.normalised(xc));
    const Vector sloped = grad * slope;
    sums[0] += sloped;
    sums[1] = multiply_add(sloped, xc, sums[1]);
    if constexpr (GATED) {
      sums[2] += slope;
      sums[3] = multiply_add(slope, xc, sums[3]);
      sums[4] = multiply_add(grad, value, sums[4]);
    }
  }
};

template <Act ACT> struct NormGrad {
  static constexpr int SUMS = 0;
  static constexpr bool READS_GRAD = true;

  template <class Vector>
  REVBIFPN_INLINE static Vector step(const Factors<Vector> &f, Vector x, Vector grad, Vector *) {
    const Vector xc = x - f.mean, slope = activate<ACT>(f.normalised(xc)).slope;
    const Vector dy = multiply_add(grad, f.gate, f.grad_mean);
    const Vector rest = multiply_add(f.tilt, xc, f.offset);
    return f.scale * multiply_add(dy, slope, rest);
  }
};
