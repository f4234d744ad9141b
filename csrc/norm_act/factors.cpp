// A batch norm, and stochastic depth, as a scale and a shift per plane, on CPUs.

#include <tuple>

#include "../common.h"

namespace revbifpn {
namespace {

constexpr const char *OP = "norm_factors";

template <class T>
void fill(const Tensor &mean, const Tensor &invstd, const OptionalTensor &weight,
          const OptionalTensor &bias, const OptionalTensor &kept, const Tensor &scale,
          const Tensor &shift) {
  const int64_t samples = scale.size(0), channels = scale.size(1);
  const T *means = values_of<T>(OP, "mean", mean, channels);
  const T *invstds = values_of<T>(OP, "invstd", invstd, channels);
  const T *weights = values_of<T>(OP, "weight", weight, channels);
  const T *biases = values_of<T>(OP, "bias", bias, channels);
  const T *factors = values_of<T>(OP, "kept", kept, samples);
  T *scales = static_cast<T *>(scale.data_ptr()), *shifts = static_cast<T *>(shift.data_ptr());
  for (int64_t n = 0; n < samples; ++n) {
    const T factor = factors == nullptr ? T(1) : factors[n];
    for (int64_t c = 0; c < channels; ++c) {
      const T own = invstds[c] * (weights == nullptr ? T(1) : weights[c]);
      const T rest = (biases == nullptr ? T(0) : biases[c]) - means[c] * own;
      scales[n * channels + c] = own * factor;
      shifts[n * channels + c] = rest * factor;
    }
  }
}

std::tuple<Tensor, Tensor> norm_factors_cpu(const Tensor &mean, const Tensor &invstd,
                                            const OptionalTensor &weight,
                                            const OptionalTensor &bias, const OptionalTensor &kept,
                                            int64_t samples) {
  STD_TORCH_CHECK(mean.dim() == 1 && samples >= 0, OP,
                  ": mean must have shape (C), and samples be at least 0");
  const ScalarType type = mean.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, OP,
                  ": mean must be float32 or float64");
  const std::vector<int64_t> shape = {samples, mean.size(0)};
  const Tensor scale = new_tensor(mean, shape, type), shift = new_tensor(mean, shape, type);
  if (type == ScalarType::Double)
    fill<double>(mean, invstd, weight, bias, kept, scale, shift);
  else
    fill<float>(mean, invstd, weight, bias, kept, scale, shift);
  return {scale, shift};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("norm_factors", TORCH_BOX(&norm_factors_cpu));
}

} // namespace revbifpn
