// Arguments of operators on sums and gates: activations by name, and what is kept in float32, or in
// float64 for float64.

#pragma once

#include "common.h"
#include "norm_act.h"

namespace revbifpn {

using OptionalTensor = std::optional<Tensor>;

inline Act act_of(const char *op, const std::string &act) {
  if (act == "identity")
    return Act::identity;
  if (act == "relu")
    return Act::relu;
  if (act == "hardswish")
    return Act::hardswish;
  STD_TORCH_CHECK(act == "silu", op, ": act must be identity, relu, hardswish or silu, got ", act);
  return Act::silu;
}

inline ScalarType sums_type(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty_sums(const Tensor &x, const std::vector<int64_t> &shape) {
  return torch::stable::empty(shape, sums_type(dtype_of("norm_act", x.scalar_type())), std::nullopt,
                              x.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::Contiguous);
}

/// The values of a tensor of sums, such as (C) or (N, C); null for none.
template <class Acc>
const Acc *values_of(const char *op, const char *name, const OptionalTensor &tensor,
                     int64_t elements) {
  if (!tensor)
    return nullptr;
  const ScalarType type = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == type &&
                      tensor->numel() == elements && tensor->is_contiguous(),
                  op, ": ", name, " must be contiguous, of ", elements,
                  " elements of the type that sums are kept in");
  return static_cast<const Acc *>(tensor->data_ptr());
}

} // namespace revbifpn
