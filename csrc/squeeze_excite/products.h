// Products of small matrices and activations of their results, for squeeze-excite.

// Registers of a block of LANES numbers.
template <class Acc> constexpr int PARTS = LANES / WIDTH<Acc>;

// Sums that hide the latency of an addition.
constexpr int ROWS_OF_PRODUCTS = 4;

/// 16 neighbours in memory.
template <class Acc> struct Block {
  vector_of<Acc> parts[PARTS<Acc>];
};

template <class Acc> REVBIFPN_INLINE Block<Acc> load_block(const Acc *values) {
  Block<Acc> block;
  REVBIFPN_UNROLLED(p, PARTS<Acc>) block.parts[p] = load_vector(values + p * WIDTH<Acc>);
  return block;
}

/// The first `lanes` of 16 values, and zeros.
template <class Acc> REVBIFPN_INLINE Block<Acc> keep_first(Block<Acc> block, int64_t lanes) {
  vector_of<Acc> numbers;
  REVBIFPN_UNROLLED(lane, WIDTH<Acc>) numbers[lane] = static_cast<Acc>(lane);
  REVBIFPN_UNROLLED(p, PARTS<Acc>) {
    const Acc kept = static_cast<Acc>(lanes - p * WIDTH<Acc>);
    block.parts[p] = numbers < kept ? block.parts[p] : vector_of<Acc>{};
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

/// The lower half of the lanes plus the upper one, until four are left: the same sums for registers
/// of any width.
template <class Number, int COUNT>
REVBIFPN_INLINE auto fold(typename VectorOf<Number, COUNT>::Type lanes) {
  if constexpr (COUNT == 4)
    return lanes;
  else {
    typename VectorOf<Number, COUNT / 2>::Type halves[2];
    __builtin_memcpy(halves, &lanes, sizeof(lanes));
    return fold<Number, COUNT / 2>(halves[0] + halves[1]);
  }
}
template <class Acc> REVBIFPN_INLINE auto fold(Block<Acc> block) {
  for (int half = PARTS<Acc> / 2; half > 0; half /= 2)
    REVBIFPN_UNROLLED(p, half) block.parts[p] += block.parts[p + half];
  return fold<Acc, WIDTH<Acc>>(block.parts[0]);
}

/// The sums of all lanes of COLUMNS blocks, and the bias; the last step for 4 of them together.
template <int COLUMNS, class Acc>
REVBIFPN_INLINE void store_sums(const Block<Acc> *sums, const Acc *bias, Acc *out) {
  if constexpr (COLUMNS == 1 || sizeof(Acc) == 8) {
    for (int column = 0; column < COLUMNS; ++column) {
      Acc a[LANES];
      REVBIFPN_UNROLLED(p, PARTS<Acc>)
      store_vector(sums[column].parts[p], a + p * WIDTH<Acc>);
      for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane)
          a[lane] += a[lane + half];
      out[column] = a[0] + bias[column];
    }
  } else {
    static_assert(COLUMNS == 4);
    using Four = typename VectorOf<Acc, 4>::Type;
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
      REVBIFPN_UNROLLED(p, PARTS<Acc>)
      sums[c].parts[p] = multiply_add(values.parts[p], factors.parts[p], sums[c].parts[p]);
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
      const auto factor = splat<vector_of<Acc>>(left[r * job.left_row + term * job.left_term]);
      REVBIFPN_UNROLLED(p, PARTS<Acc>)
      sums[r].parts[p] = multiply_add(values.parts[p], factor, sums[r].parts[p]);
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
  with_act(job.act, [&]<Act ACT>() {
    for (int64_t first = begin; first < end; first += WIDTH<Acc>) {
      const int64_t lanes = std::min<int64_t>(WIDTH<Acc>, end - first);
      const auto z = load_lanes(job.z + first, lanes);
      if (job.grad == nullptr)
        store_lanes(activate<ACT>(z).value, job.out + first, lanes);
      else
        store_lanes(load_lanes(job.grad + first, lanes) * activate<ACT>(z).slope, job.out + first,
                    lanes);
    }
  });
}
