// A 1x1 convolution of channels_last maps as a matrix product of pixels, on CPUs.

#include <tuple>

#include "../common.h"

namespace revbifpn {
namespace {

namespace stable = torch::stable;

/// (N * H * W, C) of maps, which are copied unless they are dense in channels_last.
Tensor pixels_of(const Tensor &maps) {
  // Dense, as convolutions make them: how a product rounds depends on the strides, and exact mode
  // needs the same bits of a stream's half as of a map of its own.
  const Tensor dense = stable::contiguous(maps, MemoryFormat::ChannelsLast);
  const Tensor channels_behind = stable::transpose(stable::transpose(dense, 1, 2), 2, 3);
  return stable::view(channels_behind, {maps.numel() / maps.size(1), maps.size(1)});
}

/// The maps (N, C, H, W) of pixels (N * H * W, C).
Tensor maps_of_pixels(const Tensor &pixels, const Tensor &like) {
  const Tensor maps =
      stable::view(pixels, {like.size(0), like.size(2), like.size(3), pixels.size(1)});
  return stable::transpose(stable::transpose(maps, 2, 3), 1, 2);
}

/// (O, C) of weights (O, C, 1, 1). Checked here: PyTorch's own errors lose their text on the way
/// through the stable interface.
Tensor matrix_of(const char *op, const Tensor &weight, const Tensor &x) {
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() == weight.size(0) * channels, op,
                  ": weight must have shape (O, ", channels, ", 1, 1)");
  STD_TORCH_CHECK(channels > 0 && weight.size(0) > 0 && weight.is_cpu() &&
                      weight.scalar_type() == x.scalar_type(),
                  op, ": weight must have channels on both sides, x's dtype and device");
  return stable::reshape(weight, {weight.size(0), channels});
}

Tensor pointwise_conv_cpu(const Tensor &x, const Tensor &weight) {
  const char *op = "pointwise_conv";
  maps_of(op, x); // checks
  const Tensor matrix = matrix_of(op, weight, x);
  return maps_of_pixels(stable::matmul(pixels_of(x), stable::transpose(matrix, 0, 1)), x);
}

std::tuple<Tensor, Tensor> pointwise_conv_backward_cpu(const Tensor &grad, const Tensor &x,
                                                       const Tensor &weight) {
  const char *op = "pointwise_conv_backward";
  maps_of(op, x); // checks
  maps_of(op, grad);
  const Tensor matrix = matrix_of(op, weight, x);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.size(1) == weight.size(0) &&
                      grad.size(0) == x.size(0) && grad.size(2) == x.size(2) &&
                      grad.size(3) == x.size(3),
                  op, ": grad must have the shape and dtype of the convolution's result");
  const Tensor grad_pixels = pixels_of(grad);
  const Tensor grad_weight = stable::matmul(stable::transpose(grad_pixels, 0, 1), pixels_of(x));
  return {maps_of_pixels(stable::matmul(grad_pixels, matrix), x),
          stable::view(grad_weight, {weight.size(0), weight.size(1), 1, 1})};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("pointwise_conv", TORCH_BOX(&pointwise_conv_cpu));
  m.impl("pointwise_conv_backward", TORCH_BOX(&pointwise_conv_backward_cpu));
}

} // namespace revbifpn
