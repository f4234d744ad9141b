// Batch norm, activation and gate: the computation of each kernel on one vector of lanes. A step
// either adds to its sums or returns the vector that is stored.

/// The values that are constant over a unit of work, for one vector of lanes.
template <class Vector> struct Factors {
  Act act;
  Vector mean, invstd, weight, bias, gate, grad_mean, offset, tilt;

  /// Multiplies by invstd and weight in turn: the rounding of their product would add up in sums.
  REVBIFPN_INLINE Vector normalised(Vector xc) const { return xc * invstd * weight + bias; }
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
    sums[1] += xc * xc;
    sums[2] += x;
  }
};

struct Means {
  static constexpr int SUMS = 1;
  static constexpr bool READS_GRAD = false;

  template <class Vector>
  REVBIFPN_INLINE static void step(const Factors<Vector> &f, Vector x, Vector, Vector *sums) {
    sums[0] += act_lanes(f.act, f.normalised(x - f.mean));
  }
};

struct NormAct {
  static constexpr int SUMS = 0;
  static constexpr bool READS_GRAD = false;

  template <class Vector>
  REVBIFPN_INLINE static Vector step(const Factors<Vector> &f, Vector x, Vector, Vector *) {
    return act_lanes(f.act, f.normalised(x - f.mean)) * f.gate;
  }
};

template <bool GATED> struct GradSums {
  static constexpr int SUMS = GATED ? 5 : 2;
  static constexpr bool READS_GRAD = true;

  template <class Vector>
  REVBIFPN_INLINE static void step(const Factors<Vector> &f, Vector x, Vector grad, Vector *sums) {
    const Vector xc = x - f.mean, z = f.normalised(xc);
    const Vector slope = slope_lanes(f.act, z), sloped = grad * slope;
    sums[0] += sloped;
    sums[1] += sloped * xc;
    if constexpr (GATED) {
      sums[2] += slope;
      sums[3] += slope * xc;
      sums[4] += grad * act_lanes(f.act, z);
    }
  }
};

struct NormGrad {
  static constexpr int SUMS = 0;
  static constexpr bool READS_GRAD = true;

  template <class Vector>
  REVBIFPN_INLINE static Vector step(const Factors<Vector> &f, Vector x, Vector grad, Vector *) {
    const Vector xc = x - f.mean, z = f.normalised(xc);
    const Vector dz = (grad * f.gate + f.grad_mean) * slope_lanes(f.act, z);
    return f.invstd * f.weight * (dz - f.offset - f.tilt * xc);
  }
};
