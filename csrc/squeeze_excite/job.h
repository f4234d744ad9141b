// Squeeze-excite's products and activations as the operators describe them to the kernels. Plain
// C++, no PyTorch.

#pragma once

#include "../norm_act/job.h"

namespace revbifpn {

constexpr int64_t COLUMNS_OF_DOTS = 4;

/// A product of small matrices, out (rows, columns). A unit of work is a block of columns, for all
/// rows: LANES columns in `product_units`, COLUMNS_OF_DOTS in `dots_units`. So the block's
/// part of `right` is read from memory once.
template <class Acc> struct ProductJob {
  using Workspace = Acc;

  const Acc *left; // at (row, term): left[row * left_row + term * left_term]
  int64_t left_row, left_term;
  const Acc *right; // dense: (terms, columns), or (columns, terms) in `dots_units`
  const Acc *bias;  // (columns) or null
  Acc *out;
  int64_t rows, columns, terms;

  int64_t workspace_size() const { return 0; }
};

/// out = act(z), or grad * act'(z) where there is a gradient. A unit of work is an element.
template <class Acc> struct ActJob {
  using Workspace = Acc;

  Act act;
  const Acc *z, *grad;
  Acc *out;
};

} // namespace revbifpn
