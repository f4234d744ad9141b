// What the operators and kernels of squeeze-excite share. Plain C++, no PyTorch.

#pragma once

#include "norm_act.h"

namespace revbifpn {

/// A product of small matrices, out (rows, columns). A unit of work is a block of columns, for all
/// rows: what `right` holds of it is read from memory once.
template <class Acc> struct ProductJob {
  static constexpr int64_t LANES = 16;

  const Acc *left; // at (row, term): left[row * left_row + term * left_term]
  int64_t left_row, left_term;
  const Acc *right; // dense: (terms, columns), or (columns, terms) where it is transposed
  const Acc *bias;  // (columns) or null
  Acc *out;
  int64_t rows, columns, terms;
};

template <class Acc> int64_t workspace_size(const ProductJob<Acc> &) { return 0; }

/// out = act(z), or grad * act'(z) where there is a gradient.
template <class Acc> struct ActJob {
  Act act;
  const Acc *z, *grad;
  Acc *out;
};

constexpr int64_t COLUMNS_OF_DOTS = 4;

// As in resample.h. `product_units`: out = left * right, a unit is LANES columns; `dots_units`: out
// = left * transpose(right) + bias, whose terms lie side by side on both sides, a unit is
// COLUMNS_OF_DOTS columns; `act_values` does [begin, end).
#define REVBIFPN_DECLARE_PRODUCT_KERNELS(isa)                                                      \
  namespace isa {                                                                                  \
  template <class Acc> void product_units(const ProductJob<Acc> &, int64_t, int64_t, Acc *);       \
  template <class Acc> void dots_units(const ProductJob<Acc> &, int64_t, int64_t, Acc *);          \
  template <class Acc> void act_values(const ActJob<Acc> &, int64_t, int64_t);                     \
  }
REVBIFPN_DECLARE_PRODUCT_KERNELS(baseline)
#ifdef __x86_64__
REVBIFPN_DECLARE_PRODUCT_KERNELS(avx2)
REVBIFPN_DECLARE_PRODUCT_KERNELS(avx512)
#endif

} // namespace revbifpn
