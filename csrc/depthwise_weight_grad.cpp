// The gradient of a depthwise convolution with respect to its weights, on CPUs: image by image,
// then summed.

#include "depthwise.h"

namespace revbifpn {
namespace {

template <class T>
void run_depthwise(DepthwiseJob<accumulator_t<T>> job, int64_t images, const Tensor &result) {
  using Acc = accumulator_t<T>;
  const int64_t taps = result.numel();
  std::vector<Acc> sums(images * taps);
  job.sums = sums.data();
  const int64_t units = images * job.blocks() * job.kernel_size;
  const int64_t products = images * taps * job.grad.height * job.grad.width;
  run_units(job, units, units, products, {}, REVBIFPN_BEST_KERNEL(depthwise_units, T));
  Acc *totals = static_cast<Acc *>(result.data_ptr());
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
  STD_TORCH_CHECK(
      is_size(kernel_size, 1) && is_size(stride, 1) && is_size(padding, 0), op,
      ": kernel_size and stride must be at least 1, padding at least 0, all below 2^31");
  STD_TORCH_CHECK(grad_maps.height == convolved_side(x_maps.height, kernel_size, stride, padding) &&
                      grad_maps.width == convolved_side(x_maps.width, kernel_size, stride, padding),
                  op, ": grad must have the sides of the convolution's result");
  STD_TORCH_CHECK(x.size(1) <= 1 || (x_maps.stride_c == 1 && grad_maps.stride_c == 1), op,
                  ": maps must be in channels_last");
  const std::vector<int64_t> shape = {x.size(1), 1, kernel_size, kernel_size};
  const ScalarType sum_type =
      x_maps.dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  const Tensor result =
      torch::stable::empty(shape, sum_type, std::nullopt, x.device(), std::nullopt,
                           torch::headeronly::MemoryFormat::Contiguous);
  dispatch_dtype(x_maps.dtype, [&](auto element) {
    using T = decltype(element);
    run_depthwise<T>({x_maps, grad_maps, nullptr, x.size(1), kernel_size, stride, padding},
                     x.size(0), result);
  });
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("depthwise_weight_grad", TORCH_BOX(&depthwise_weight_grad_cpu));
}

} // namespace revbifpn
