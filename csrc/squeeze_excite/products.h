// Products of small matrices and activations of their results, for squeeze-excite.

// Vectors of REVBIFPN_REGISTER bytes, of which a block of 16 lanes takes PARTS: GCC keeps arrays of
// vectors that are longer than a register in memory.

template <class Acc> constexpr int LANES_OF_PART = REVBIFPN_REGISTER / sizeof(Acc);
template <class Acc> using register_of = typename VectorOf<Acc, LANES_OF_PART<Acc>>::Type;
template <class Acc> constexpr int PARTS = LANES / LANES_OF_PART<Acc>;

// Sums that hide the latency of an addition.
constexpr int ROWS_OF_PRODUCTS = 4;

#define REVBIFPN_UNROLLED(index, count)                                                            \
  _Pragma("GCC unroll 8") for (int index = 0; index < (count); ++index)

/// 16 neighbours in memory.
template <class Acc> struct Block {
  register_of<Acc> parts[PARTS<Acc>];
};

template <class Acc> REVBIFPN_INLINE Block<Acc> load_block(const Acc *values) {
  Block<Acc> block;
  REVBIFPN_UNROLLED(p, PARTS<Acc>)
  __builtin_memcpy(&block.parts[p], values + p * LANES_OF_PART<Acc>, REVBIFPN_REGISTER);
  return block;
}

/// The first `lanes` of 16 values, and zeros.
template <class Acc> REVBIFPN_INLINE Block<Acc> keep_first(Block<Acc> block, int64_t lanes) {
  register_of<Acc> numbers;
  REVBIFPN_UNROLLED(lane, LANES_OF_PART<Acc>) numbers[lane] = static_cast<Acc>(lane);
  REVBIFPN_UNROLLED(p, PARTS<Acc>) {
    const Acc kept = static_cast<Acc>(lanes - p * LANES_OF_PART<Acc>);
    block.parts[p] = numbers < kept ? block.parts[p] : register_of<Acc>{};
  }
  return block;
}

/// The same, read one by one: for rows at the end of their memory, where a whole load would leave
/// it.
template <class Acc> REVBIFPN_INLINE Block<Acc> load_last(const Acc *values, int64_t lanes) {
  Acc copied[LANES] = {};
  for (int64_t lane = 0; lane < lanes; ++lane)
    copied[lane] = values[lane];
  return load_block(copied);
}

template <class Acc> using four_lanes = typename VectorOf<Acc, 4>::Type;

/// The lower half of the lanes plus the upper one. By way of two halves, which compilers take from
/// a register; four quarters they would read back from memory.
template <int COUNT, class Whole> REVBIFPN_INLINE auto add_halves(const Whole &whole) {
  using Acc = std::remove_cvref_t<decltype(Whole{}[0])>;
  typename VectorOf<Acc, COUNT>::Type halves[2];
  static_assert(sizeof(halves) == sizeof(whole));
  __builtin_memcpy(halves, &whole, sizeof(halves));
  return halves[0] + halves[1];
}

/// Quarters of the lanes added up: the same sums for registers of any length.
template <class Acc> REVBIFPN_INLINE four_lanes<Acc> fold(const Block<Acc> &block) {
  lane_vector<Acc> lanes;
  __builtin_memcpy(&lanes, block.parts, sizeof(lanes));
  return add_halves<4>(add_halves<8>(lanes));
}

/// The sums of all lanes of COLUMNS blocks, and the bias; the last step for 4 of them together.
template <int COLUMNS, class Acc>
REVBIFPN_INLINE void store_sums(const Block<Acc> *sums, const Acc *bias, Acc *out) {
  using Four = four_lanes<Acc>;
  if constexpr (COLUMNS == 1) {
    const Four a = fold(sums[0]);
    out[0] = (a[0] + a[2]) + (a[1] + a[3]) + bias[0];
  } else {
    static_assert(COLUMNS == 4);
    const Four a = fold(sums[0]), b = fold(sums[1]), c = fold(sums[2]), d = fold(sums[3]);
    const Four ab = Four{a[0], b[0], a[1], b[1]} + Four{a[2], b[2], a[3], b[3]};
    const Four cd = Four{c[0], d[0], c[1], d[1]} + Four{c[2], d[2], c[3], d[3]};
    Four results = Four{ab[0], ab[1], cd[0], cd[1]} + Four{ab[2], ab[3], cd[2], cd[3]}, biases;
    __builtin_memcpy(&biases, bias, sizeof(biases));
    results += biases;
    __builtin_memcpy(out, &results, sizeof(results));
  }
}

/// COLUMNS dots of one row. IS_LAST: a row of `left` or `right` ends so near the end of its memory
/// that a load of 16 values from its last part would leave it.
template <int COLUMNS, bool IS_LAST, class Acc>
REVBIFPN_INLINE void dots_of_row(const ProductJob<Acc> &job, const Acc *left, const Acc *right,
                                 const Acc *bias, Acc *out) {
  const int64_t whole = job.terms / LANES * LANES, rest = job.terms - whole;
  Block<Acc> sums[COLUMNS] = {};
  const auto load_rest = [&](const Acc *values) {
    return IS_LAST ? load_last(values, rest) : keep_first(load_block(values), rest);
  };
  const auto add = [&](const auto &load, int64_t term) __attribute__((always_inline)) {
    const Block<Acc> values = load(left + term);
    REVBIFPN_UNROLLED(c, COLUMNS) {
      const Block<Acc> factors = load(right + c * job.terms + term);
      REVBIFPN_UNROLLED(p, PARTS<Acc>) sums[c].parts[p] += values.parts[p] * factors.parts[p];
    }
  };
  for (int64_t term = 0; term < whole; term += LANES)
    add(load_block<Acc>, term);
  if (rest > 0)
    add(load_rest, whole);
  store_sums<COLUMNS>(sums, bias, out);
}

template <int COLUMNS, class Acc>
REVBIFPN_INLINE void dots_of_columns(const ProductJob<Acc> &job, int64_t column) {
  const int64_t rest = job.terms % LANES;
  // By how many values the last load of 16 exceeds its row.
  const int64_t reach = rest == 0 ? 0 : LANES - rest;
  const bool is_last = (job.columns - column - COLUMNS) * job.terms < reach;
  const Acc *right = job.right + column * job.terms, *bias = job.bias + column;
  for (int64_t row = 0; row < job.rows; ++row) {
    const Acc *left = job.left + row * job.terms;
    Acc *out = job.out + row * job.columns + column;
    if (is_last || (job.rows - row - 1) * job.terms < reach)
      dots_of_row<COLUMNS, true>(job, left, right, bias, out);
    else
      dots_of_row<COLUMNS, false>(job, left, right, bias, out);
  }
}

template <class T>
void dots_units(const ProductJob<accumulator_t<T>> &job, int64_t begin, int64_t end,
                accumulator_t<T> *) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * COLUMNS_OF_DOTS;
    if (first + COLUMNS_OF_DOTS <= job.columns)
      dots_of_columns<COLUMNS_OF_DOTS>(job, first);
    else
      for (int64_t column = first; column < job.columns; ++column)
        dots_of_columns<1>(job, column);
  }
}

/// `lanes` columns from `column` on, of some rows.
template <int ROWS, class Acc>
REVBIFPN_INLINE void product_of_rows(const ProductJob<Acc> &job, int64_t row, int64_t column,
                                     int64_t lanes) {
  const Acc *left = job.left + row * job.left_row, *right = job.right + column;
  // Terms whose 16 values may be read; the lanes that are not wanted are dropped at the end.
  const int64_t readable = job.terms * job.columns - column - LANES;
  const int64_t whole = readable < 0 ? 0 : std::min(job.terms, readable / job.columns + 1);
  Block<Acc> sums[ROWS] = {};
  const auto add = [&](const Block<Acc> &values, int64_t term) __attribute__((always_inline)) {
    REVBIFPN_UNROLLED(r, ROWS) {
      const Acc factor = left[r * job.left_row + term * job.left_term];
      REVBIFPN_UNROLLED(p, PARTS<Acc>) sums[r].parts[p] += values.parts[p] * factor;
    }
  };
  for (int64_t term = 0; term < whole; ++term)
    add(load_block(right + term * job.columns), term);
  for (int64_t term = whole; term < job.terms; ++term)
    add(load_last(right + term * job.columns, lanes), term);
  for (int r = 0; r < ROWS; ++r) {
    Acc *out = job.out + (row + r) * job.columns + column;
    if (lanes == LANES)
      __builtin_memcpy(out, sums[r].parts, sizeof(sums[r].parts));
    else
      __builtin_memcpy(out, sums[r].parts, lanes * sizeof(Acc));
  }
}

template <class T>
void product_units(const ProductJob<accumulator_t<T>> &job, int64_t begin, int64_t end,
                   accumulator_t<T> *) {
  const int64_t whole = job.rows / ROWS_OF_PRODUCTS * ROWS_OF_PRODUCTS;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t column = unit * LANES, lanes = std::min(LANES, job.columns - column);
    for (int64_t row = 0; row < whole; row += ROWS_OF_PRODUCTS)
      product_of_rows<ROWS_OF_PRODUCTS>(job, row, column, lanes);
    for (int64_t row = whole; row < job.rows; ++row)
      product_of_rows<1>(job, row, column, lanes);
  }
}

template <class T>
void act_units(const ActJob<accumulator_t<T>> &job, int64_t begin, int64_t end,
               accumulator_t<T> *) {
  using Acc = accumulator_t<T>;
  for (int64_t first = begin; first < end; first += LANES) {
    const int64_t lanes = std::min(LANES, end - first);
    const lane_vector<Acc> z = load_lanes(job.z + first, lanes);
    if (job.grad == nullptr) {
      store_lanes<Acc>(act_lanes(job.act, z), job.out + first, lanes);
    } else {
      const lane_vector<Acc> grad = load_lanes(job.grad + first, lanes);
      store_lanes<Acc>(grad * slope_lanes(job.act, z), job.out + first, lanes);
    }
  }
}
#undef REVBIFPN_UNROLLED
