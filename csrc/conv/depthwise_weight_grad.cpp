// The gradient of a depthwise convolution with respect to its weights, on CPUs: per image, then
// summed.

#include "depthwise.h"

namespace revbifpn {
namespace {

template <class T>
void run_depthwise(DepthwiseWeightJob<accumulator_t<T>> job, int64_t images, const Tensor &result) {
  using Acc = accumulator_t<T>;
  const int64_t taps = result.numel();
  std::vector<Acc> sums(images * taps);
  job.sums = sums.data();
  run_units(job, images * job.blocks() * job.kernel_size,
            images * taps * job.grad.height * job.grad.width,
            REVBIFPN_BEST_KERNEL(depthwise_weight_units, T));
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
  m.impl("depthwise_weight_grad", TORCH_BOX(&depthwise_weight_grad_cpu));
}

} // namespace revbifpn
