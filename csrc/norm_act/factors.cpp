// A batch norm, and stochastic depth, as a scale and a shift per plane, on CPUs.

#include <tuple>

#include "norm_act.h"

namespace revbifpn {

std::tuple<Tensor, Tensor> norm_factors_cpu(const Tensor &mean, const Tensor &invstd,
                                            const OptionalTensor &weight,
                                            const OptionalTensor &bias, const OptionalTensor &kept,
                                            int64_t samples) {
  const char *op = "norm_factors";
  STD_TORCH_CHECK(mean.dim() == 1 && samples >= 0, op,
                  ": mean must have shape (C), and samples be at least 0");
  const ScalarType type = mean.scalar_type();
  const int64_t channels = mean.size(0);
  const Tensor scale = new_tensor(mean, {samples, channels}, type);
  const Tensor shift = new_tensor(mean, {samples, channels}, type);
  dispatch_sums(type, [&]<class T>() {
    const T *means = values_of<T>(op, "mean", mean, channels);
    const T *invstds = values_of<T>(op, "invstd", invstd, channels);
    const T *weights = values_of<T>(op, "weight", weight, channels);
    const T *biases = values_of<T>(op, "bias", bias, channels);
    const T *factors = values_of<T>(op, "kept", kept, samples);
    T *scales = data_of<T>(scale), *shifts = data_of<T>(shift);
    for (int64_t n = 0; n < samples; ++n) {
      const T factor = factors == nullptr ? T(1) : factors[n];
      for (int64_t c = 0; c < channels; ++c) {
        const T own = invstds[c] * (weights == nullptr ? T(1) : weights[c]);
        const T rest = (biases == nullptr ? T(0) : biases[c]) - means[c] * own;
        scales[n * channels + c] = own * factor;
        shifts[n * channels + c] = rest * factor;
      }
    }
  });
  return {scale, shift};
}

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("norm_factors", TORCH_BOX(&norm_factors_cpu));
}

} // namespace revbifpn
