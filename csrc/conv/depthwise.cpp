// The gradients of a depthwise convolution on CPUs: of its input, row by row, and of its weights,
// per image, then summed.

#include "../common.h"

namespace revbifpn {
namespace {

/// Raises unless `grad` has the sides of the result of a convolution of maps of height x width, and
/// every size is so small that products of sizes do not overflow.
void check_convolution(const char *op, const Maps &grad, int64_t height, int64_t width,
                       int64_t kernel_size, int64_t stride, int64_t padding) {
  const auto is_size = [](int64_t value, int64_t least) {
    return value >= least && value < INT32_MAX;
  };
  STD_TORCH_CHECK(is_size(height, 1) && is_size(width, 1) && is_size(kernel_size, 1) &&
                      is_size(stride, 1) && is_size(padding, 0),
                  op, ": height, width, kernel_size and stride must be at least 1, padding at ",
                  "least 0, all below 2^31, got ", height, ", ", width, ", ", kernel_size, ", ",
                  stride, " and ", padding);
  const auto side = [&](int64_t of) { return (of + 2 * padding - kernel_size) / stride + 1; };
  STD_TORCH_CHECK(grad.height == side(height) && grad.width == side(width), op,
                  ": grad must have the sides of the convolution's result, ", side(height), " x ",
                  side(width), ", got ", grad.height, " x ", grad.width);
}

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

template <class T>
void run_depthwise(DepthwiseWeightJob<accumulator_t<T>> job, int64_t images, const Tensor &result) {
  using Acc = accumulator_t<T>;
  const int64_t taps = result.numel();
  std::vector<Acc> sums(images * taps);
  job.sums = sums.data();
  run_units(job, images * job.blocks() * job.kernel_size,
            images * taps * job.grad.height * job.grad.width,
            REVBIFPN_BEST_KERNEL(depthwise_weight_units, T));
  Acc *totals = data_of<Acc>(result);
  for (int64_t tap = 0; tap < taps; ++tap) {
    double total = 0;
    for (int64_t image = 0; image < images; ++image)
      total += sums[image * taps + tap];
    totals[tap] = static_cast<Acc>(total);
  }
}

Tensor depthwise_weight_grad_cpu(const Tensor &x, const Tensor &grad, int64_t kernel_size,
                                 int64_t stride, int64_t padding) {
  const char *op = "depthwise_weight_grad";
  const Maps x_maps = maps_of(op, x), grad_maps = maps_of(op, grad);
  check_same_planes(op, x, grad);
  STD_TORCH_CHECK(x_maps.dtype == grad_maps.dtype, op, ": grad must have x's dtype");
  check_convolution(op, grad_maps, x_maps.height, x_maps.width, kernel_size, stride, padding);
  STD_TORCH_CHECK(x.size(1) <= 1 || (x_maps.stride_c == 1 && grad_maps.stride_c == 1), op,
                  ": x and grad must be channels_last");
  const Tensor result =
      new_tensor(x, {x.size(1), 1, kernel_size, kernel_size}, sums_type(x_maps.dtype));
  dispatch_dtype(x_maps.dtype, [&]<class T>() {
    run_depthwise<T>({x_maps, grad_maps, x.size(1), kernel_size, stride, padding, nullptr},
                     x.size(0), result);
  });
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("depthwise_input_grad", TORCH_BOX(&depthwise_input_grad_cpu));
  m.impl("depthwise_weight_grad", TORCH_BOX(&depthwise_weight_grad_cpu));
}

} // namespace revbifpn
