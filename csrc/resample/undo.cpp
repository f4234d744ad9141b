// x = y - alpha * sum_k R_k(s_k) and [alpha * transpose(R_k)(grad)] on CPUs. The halves share no
// large map (y and x; grad and the results), so they run one after the other.

#include <tuple>

#include "resample.h"

namespace revbifpn {
namespace {

std::tuple<Tensor, TensorList> resample_undo_cpu(const Tensor &y, const Tensor &grad,
                                                 const TensorList &sources,
                                                 const TensorList &scales, const TensorList &shifts,
                                                 double alpha, const std::string &mode,
                                                 std::optional<double> lattice) {
  const char *op = "resample_undo";
  check_like(op, "grad", grad, "y", y);
  Tensor x = torch::stable::empty_like(y);
  resample_add_into(op, y, x, {sources, scales, shifts, -alpha, mode, lattice});
  TensorList grad_sources;
  for (const Tensor &source : sources)
    grad_sources.push_back(torch::stable::empty_like(source));
  resample_adjoint_into(op, grad, grad_sources, alpha, mode);
  return {x, grad_sources};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("resample_undo", TORCH_BOX(&resample_undo_cpu));
}

} // namespace revbifpn
