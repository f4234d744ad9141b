// The gradient of a depthwise convolution with respect to its input, row by row, on CPUs.

#include "depthwise.h"

namespace revbifpn {
namespace {

constexpr const char *OP = "depthwise_input_grad";

Tensor depthwise_input_grad_cpu(const Tensor &grad, const Tensor &weight, int64_t height,
                                int64_t width, int64_t stride, int64_t padding) {
  const Maps grad_maps = maps_of(OP, grad), weights = maps_of(OP, weight);
  const int64_t channels = grad.size(1), kernel_size = weights.height;
  STD_TORCH_CHECK(weight.size(0) == channels && weight.size(1) == 1 &&
                      weights.width == kernel_size && weights.dtype == grad_maps.dtype &&
                      weight.is_contiguous(),
                  OP, ": weight must be contiguous, of shape (C, 1, k, k) and of grad's dtype");
  STD_TORCH_CHECK(
      is_size(stride, 1) && is_size(padding, 0) && is_size(height, 1) && is_size(width, 1), OP,
      ": stride, height and width must be at least 1, padding at least 0, all below "
      "2^31");
  STD_TORCH_CHECK(grad_maps.height == convolved_side(height, kernel_size, stride, padding) &&
                      grad_maps.width == convolved_side(width, kernel_size, stride, padding),
                  OP, ": grad must have the sides of the convolution's result");
  STD_TORCH_CHECK(channels <= 1 || grad_maps.stride_c == 1, OP, ": grad must be in channels_last");
  const std::vector<int64_t> shape = {grad.size(0), channels, height, width};
  Tensor result = torch::stable::empty(shape, grad.scalar_type(), std::nullopt, grad.device(),
                                       std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  dispatch_dtype(grad_maps.dtype, [&](auto element) {
    using T = decltype(element);
    const DepthwiseInputJob<accumulator_t<T>> job = {
        maps_of(OP, result), grad_maps, weight.data_ptr(), channels, kernel_size, stride, padding};
    const int64_t units = grad.size(0) * height,
                  products = grad.numel() * kernel_size * kernel_size;
    run_units(job, units, units, products, {}, REVBIFPN_BEST_KERNEL(depthwise_input_units, T));
  });
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("depthwise_input_grad", TORCH_BOX(&depthwise_input_grad_cpu));
}

} // namespace revbifpn
