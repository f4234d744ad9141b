// What the operators share: tensors as maps, checks that protect memory, and the choice of dtype.

#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include "run.h"

namespace revbifpn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const char *op, ScalarType type) {
  switch (type) {
  case ScalarType::Double:
    return Dtype::float64;
  case ScalarType::Float:
    return Dtype::float32;
  case ScalarType::BFloat16:
    return Dtype::bfloat16;
  case ScalarType::Half:
    return Dtype::float16;
  default:
    STD_TORCH_CHECK(false, op, ": maps must be float64, float32, bfloat16 or float16");
  }
}

inline Maps maps_of(const char *op, const Tensor &tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": maps must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 4, op, ": maps must have shape (N, C, H, W), got ", tensor.dim(),
                  " dimensions");
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  STD_TORCH_CHECK(sizes[2] > 0 && sizes[3] > 0, op, ": maps must have sides of at least 1, got ",
                  sizes[2], " x ", sizes[3]);
  STD_TORCH_CHECK(std::max(sizes[2], sizes[3]) < INT32_MAX, op,
                  ": maps must have sides below 2^31");
  return {tensor.data_ptr(), dtype_of(op, tensor.scalar_type()),
          sizes[2],          sizes[3],
          strides[0],        strides[1],
          strides[2],        strides[3]};
}

inline void check_same_planes(const char *op, const Tensor &x, const Tensor &other) {
  STD_TORCH_CHECK(x.size(0) == other.size(0) && x.size(1) == other.size(1), op,
                  ": maps must share (N, C) = (", x.size(0), ", ", x.size(1), "), got (",
                  other.size(0), ", ", other.size(1), ")");
}

/// Raises unless `other`, the argument `name`, has the shape and dtype of x, the argument `x_name`.
inline void check_like(const char *op, const char *name, const Tensor &other, const char *x_name,
                       const Tensor &x) {
  const Maps maps = maps_of(op, other), x_maps = maps_of(op, x);
  check_same_planes(op, x, other);
  STD_TORCH_CHECK(maps.height == x_maps.height && maps.width == x_maps.width &&
                      maps.dtype == x_maps.dtype,
                  op, ": ", name, " must have ", x_name, "'s shape and dtype");
}

/// The type in which sums over maps of `dtype` are returned.
inline ScalarType sums_type(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

template <class Acc> Acc *data_of(const Tensor &tensor) {
  return static_cast<Acc *>(tensor.data_ptr());
}

/// The values of a contiguous tensor of sums or factors; null for none.
template <class Acc>
const Acc *values_of(const char *op, const char *name, const OptionalTensor &tensor,
                     int64_t elements) {
  if (!tensor)
    return nullptr;
  const ScalarType type = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == type &&
                      tensor->numel() == elements && tensor->is_contiguous(),
                  op, ": ", name, " must be contiguous, of ", elements,
                  " elements, on the CPU, in float32 or beside float64 maps in float64; got ",
                  tensor->numel(), " elements");
  return data_of<const Acc>(*tensor);
}

/// An unwritten tensor on the device of `like`.
inline Tensor new_tensor(const Tensor &like, const std::vector<int64_t> &shape, ScalarType dtype,
                         MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, format);
}

inline bool is_channels_last(const Tensor &tensor) {
  return tensor.stride(1) == 1 && tensor.stride(3) != 1;
}

/// Calls `function` with the C++ type of `dtype` as its template argument.
template <class Function> void dispatch_dtype(Dtype dtype, Function &&function) {
  switch (dtype) {
  case Dtype::float64:
    return function.template operator()<double>();
  case Dtype::float32:
    return function.template operator()<float>();
  case Dtype::bfloat16:
    return function.template operator()<BFloat16>();
  case Dtype::float16:
    return function.template operator()<Half>();
  }
}

/// The same for `type` of sums or factors: double or float.
template <class Function> void dispatch_sums(ScalarType type, Function &&function) {
  if (type == ScalarType::Double)
    return function.template operator()<double>();
  return function.template operator()<float>();
}

} // namespace revbifpn
