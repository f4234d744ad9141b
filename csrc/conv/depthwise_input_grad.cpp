// The gradient of a depthwise convolution with respect to its input, row by row, on CPUs.

#include "depthwise.h"

namespace revbifpn {
namespace {

Tensor depthwise_input_grad_cpu(const Tensor &grad, const Tensor &weight, int64_t height,
                                int64_t width, int64_t stride, int64_t padding) {
  const char *op = "depthwise_input_grad";
  const Maps grad_maps = maps_of(op, grad), weights = maps_of(op, weight);
  const int64_t channels = grad.size(1), kernel_size = weights.height;
  STD_TORCH_CHECK(weight.size(0) == channels && weight.size(1) == 1 &&
                      weights.width == kernel_size && weights.dtype == grad_maps.dtype &&
                      weight.is_contiguous(),
                  op, ": weight must be contiguous, of shape (C, 1, k, k) and of grad's dtype");
  check_convolution(op, grad_maps, height, width, kernel_size, stride, padding);
  STD_TORCH_CHECK(channels <= 1 || grad_maps.stride_c == 1, op, ": grad must be channels_last");
  const Tensor result = new_tensor(grad, {grad.size(0), channels, height, width},
                                   grad.scalar_type(), MemoryFormat::ChannelsLast);
  dispatch_dtype(grad_maps.dtype, [&]<class T>() {
    const DepthwiseInputJob<accumulator_t<T>> job = {
        maps_of(op, result), grad_maps, channels, kernel_size, stride, padding, weight.data_ptr()};
    run_units(job, grad.size(0) * height, grad.numel() * job.taps(),
              REVBIFPN_BEST_KERNEL(depthwise_input_units, T));
  });
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("depthwise_input_grad", TORCH_BOX(&depthwise_input_grad_cpu));
}

} // namespace revbifpn
