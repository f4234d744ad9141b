// Squeeze-excite's gates and their gradient on CPUs: checks, and the products in their order.
// Kernels: products.h.

#include "../norm_act/norm_act.h"

namespace revbifpn {
namespace {

// Multiply-adds that take as long as an element of a map.
constexpr int64_t PRODUCTS_PER_ELEMENT = 16;
// Dots add up the 16 lanes of each result, which takes 10 to 20 cycles; a transposed copy of the
// weights saves that, and takes about 1.2 cycles for each of them (AMD EPYC, AVX-512, 2026-11-25).
constexpr int64_t SHORT_DOT_PER_IMAGE = 10;

template <class Acc, class Kernel>
void run(const ProductJob<Acc> &job, int64_t columns_per_unit, Kernel kernel) {
  run_units(job, ceil_div(job.columns, columns_per_unit),
            job.rows * job.columns * job.terms / PRODUCTS_PER_ELEMENT, kernel);
}

/// out (rows, columns) = left (rows, terms) * transpose(right (columns, terms)) + bias.
template <class Acc>
void dots(const Acc *left, const Acc *right, const Acc *bias, Acc *out, int64_t rows,
          int64_t columns, int64_t terms) {
  run<Acc>({left, terms, 1, right, bias, out, rows, columns, terms}, COLUMNS_OF_DOTS,
           REVBIFPN_BEST_KERNEL(dots_units, Acc));
}

/// out (rows, columns) = left (rows, terms) * right (terms, columns).
template <class Acc>
void product(const Acc *left, const Acc *right, Acc *out, int64_t rows, int64_t columns,
             int64_t terms) {
  run<Acc>({left, terms, 1, right, nullptr, out, rows, columns, terms}, LANES,
           REVBIFPN_BEST_KERNEL(product_units, Acc));
}

/// out (rows, columns) = transpose(left (terms, rows)) * right (terms, columns).
template <class Acc>
void transposed_product(const Acc *left, const Acc *right, Acc *out, int64_t rows, int64_t columns,
                        int64_t terms) {
  run<Acc>({left, 1, rows, right, nullptr, out, rows, columns, terms}, LANES,
           REVBIFPN_BEST_KERNEL(product_units, Acc));
}

/// (columns, rows) from dense values (rows, columns).
template <class Acc> std::vector<Acc> transpose(const Acc *values, int64_t rows, int64_t columns) {
  constexpr int64_t BLOCK = 16; // rows that stay in the first-level cache
  std::vector<Acc> result(rows * columns);
  for (int64_t first = 0; first < rows; first += BLOCK) {
    const int64_t end = std::min(first + BLOCK, rows);
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t row = first; row < end; ++row)
        result[column * rows + row] = values[row * columns + column];
  }
  return result;
}

/// out (columns) = the sum of all rows of values (rows, columns).
template <class Acc> void add_rows_up(const Acc *values, Acc *out, int64_t rows, int64_t columns) {
  std::fill_n(out, columns, Acc{0});
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column)
      out[column] += values[row * columns + column];
}

template <class Acc> Acc hardsigmoid(Acc z) {
  const Acc shifted = z + 3;
  const Acc positive = shifted < 0 ? Acc{0} : shifted; // NaN stays
  return (positive > 6 ? Acc{6} : positive) / 6;
}

/// PyTorch's, which holds 1/6 in float32 for float64, too.
template <class Acc> Acc hardsigmoid_backward(Acc grad, Acc z) {
  return z > -3 && z < 3 ? grad * static_cast<Acc>(1.0f / 6.0f) : Acc{0};
}

/// The values of a network; both ops compute hidden values and logits from them.
template <class Acc> struct Network {
  const Acc *means, *reduce, *reduce_bias, *expand, *expand_bias;
  int64_t images, channels, hidden;
  Act act;

  /// (images, hidden) before and after the activation.
  void squeeze(Acc *before, Acc *values) const {
    dots(means, reduce, reduce_bias, before, images, hidden, channels);
    REVBIFPN_BEST_KERNEL(act_units, Acc)
    ({act, before, nullptr, values}, 0, images * hidden, nullptr);
  }

  /// (images, channels).
  void excite(const Acc *values, Acc *logits) const {
    if (hidden > SHORT_DOT_PER_IMAGE * images)
      return dots(values, expand, expand_bias, logits, images, channels, hidden);
    const std::vector<Acc> transposed = transpose(expand, channels, hidden);
    product(values, transposed.data(), logits, images, channels, hidden);
    for (int64_t image = 0; image < images; ++image)
      for (int64_t channel = 0; channel < channels; ++channel)
        logits[image * channels + channel] += expand_bias[channel];
  }
};

Tensor dense(const Tensor &tensor) {
  return tensor.is_contiguous() ? tensor
                                : torch::stable::contiguous(tensor, MemoryFormat::Contiguous);
}

/// An unwritten contiguous tensor of this shape and dtype.
Tensor new_sums_like(const char *op, const Tensor &tensor) {
  const auto sizes = tensor.sizes();
  return new_sums(op, tensor, std::vector<int64_t>(sizes.begin(), sizes.end()));
}

/// The tensors of a network, as an op takes them.
struct Arguments {
  const Tensor &means, &reduce_weight, &reduce_bias, &expand_weight, &expand_bias;
  const std::string &act;
};

/// Calls `function` with the network of the arguments, copied where they are not dense.
template <class Function>
void with_network(const char *op, const Arguments &given, Function &&function) {
  const Tensor means = dense(given.means), reduce_weight = dense(given.reduce_weight),
               reduce_bias = dense(given.reduce_bias), expand_weight = dense(given.expand_weight),
               expand_bias = dense(given.expand_bias);
  STD_TORCH_CHECK(means.dim() == 2, op, ": means must have shape (N, C), got ", means.dim(),
                  " dimensions");
  const int64_t images = means.size(0), channels = means.size(1), hidden = reduce_bias.numel();
  dispatch_sums(means.scalar_type(), [&]<class Acc>() {
    function(Network<Acc>{values_of<Acc>(op, "means", means, images * channels),
                          values_of<Acc>(op, "reduce_weight", reduce_weight, hidden * channels),
                          values_of<Acc>(op, "reduce_bias", reduce_bias, hidden),
                          values_of<Acc>(op, "expand_weight", expand_weight, hidden * channels),
                          values_of<Acc>(op, "expand_bias", expand_bias, channels), images,
                          channels, hidden, act_of(op, given.act)});
  });
}

Tensor squeeze_excite_gates_cpu(const Tensor &means, const Tensor &reduce_weight,
                                const Tensor &reduce_bias, const Tensor &expand_weight,
                                const Tensor &expand_bias, const std::string &act) {
  const char *op = "squeeze_excite_gates";
  const Tensor gates = new_sums_like(op, means);
  with_network(op, {means, reduce_weight, reduce_bias, expand_weight, expand_bias, act},
               [&]<class Acc>(const Network<Acc> &network) {
                 std::vector<Acc> hidden(network.images * network.hidden);
                 Acc *out = data_of<Acc>(gates);
                 network.squeeze(hidden.data(), hidden.data());
                 network.excite(hidden.data(), out);
                 std::transform(out, out + gates.numel(), out, hardsigmoid<Acc>);
               });
  return gates;
}

/// The gates of act(norm(x)), and the means that they are computed from.
std::tuple<Tensor, Tensor>
norm_act_gates_cpu(const Tensor &x, const Tensor &mean, const Tensor &invstd,
                   const OptionalTensor &weight, const OptionalTensor &bias,
                   const Tensor &reduce_weight, const Tensor &reduce_bias,
                   const Tensor &expand_weight, const Tensor &expand_bias, const std::string &act,
                   const std::string &squeeze_act) {
  const Tensor means = norm_act_means_cpu(x, mean, invstd, weight, bias, act);
  return {squeeze_excite_gates_cpu(means, reduce_weight, reduce_bias, expand_weight, expand_bias,
                                   squeeze_act),
          means};
}

/// The gradients of means, reduce_weight, reduce_bias, expand_weight and expand_bias.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Acc>
void fill(const Gradients &gradients, const Acc *grad_gates, const Network<Acc> &network) {
  const auto &[means, reduce, reduce_bias, expand, expand_bias] = gradients;
  const int64_t images = network.images, channels = network.channels, hidden = network.hidden;
  std::vector<Acc> before(images * hidden), values(images * hidden), grad_before(images * hidden);
  std::vector<Acc> grad_logits(images * channels);
  network.squeeze(before.data(), values.data());
  network.excite(values.data(), grad_logits.data());
  std::transform(grad_gates, grad_gates + grad_logits.size(), grad_logits.data(),
                 grad_logits.data(), hardsigmoid_backward<Acc>);
  product(grad_logits.data(), network.expand, grad_before.data(), images, hidden, channels);
  REVBIFPN_BEST_KERNEL(act_units, Acc)
  ({network.act, before.data(), grad_before.data(), grad_before.data()}, 0, images * hidden,
   nullptr);
  product(grad_before.data(), network.reduce, data_of<Acc>(means), images, channels, hidden);
  transposed_product(grad_before.data(), network.means, data_of<Acc>(reduce), hidden, channels,
                     images);
  transposed_product(grad_logits.data(), values.data(), data_of<Acc>(expand), channels, hidden,
                     images);
  add_rows_up(grad_before.data(), data_of<Acc>(reduce_bias), images, hidden);
  add_rows_up(grad_logits.data(), data_of<Acc>(expand_bias), images, channels);
}

Gradients squeeze_excite_gates_backward_cpu(const Tensor &grad_gates, const Tensor &means,
                                            const Tensor &reduce_weight, const Tensor &reduce_bias,
                                            const Tensor &expand_weight, const Tensor &expand_bias,
                                            const std::string &act) {
  const char *op = "squeeze_excite_gates_backward";
  const Gradients gradients = {new_sums_like(op, means), new_sums_like(op, reduce_weight),
                               new_sums_like(op, reduce_bias), new_sums_like(op, expand_weight),
                               new_sums_like(op, expand_bias)};
  const Tensor grad = dense(grad_gates);
  with_network(op, {means, reduce_weight, reduce_bias, expand_weight, expand_bias, act},
               [&]<class Acc>(const Network<Acc> &network) {
                 fill(gradients, values_of<Acc>(op, "grad_gates", grad, means.numel()), network);
               });
  return gradients;
}

/// The gradients of a stage: those of x, weight and bias, then those of the network's parameters.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
norm_act_excite_grad_cpu(const Tensor &grad, const Tensor &x, const Tensor &mean,
                         const Tensor &invstd, const OptionalTensor &weight,
                         const OptionalTensor &bias, const Tensor &gate, const Tensor &means,
                         const Tensor &reduce_weight, const Tensor &reduce_bias,
                         const Tensor &expand_weight, const Tensor &expand_bias,
                         const std::string &act, const std::string &squeeze_act, bool is_batch) {
  constexpr int64_t OF_GATES = 4; // among the sums
  check_same_planes("norm_act_excite_grad", x, means);
  const Tensor sums = norm_act_sums_cpu(grad, x, mean, invstd, weight, bias, act, true);
  const auto [grad_means, grad_reduce, grad_reduce_bias, grad_expand, grad_expand_bias] =
      squeeze_excite_gates_backward_cpu(torch::stable::select(sums, 0, OF_GATES), means,
                                        reduce_weight, reduce_bias, expand_weight, expand_bias,
                                        squeeze_act);
  const auto [dx, dweight, dbias] =
      norm_act_grad_cpu(grad, x, mean, invstd, weight, bias, gate, grad_means, sums, act, is_batch);
  return {dx, dweight, dbias, grad_reduce, grad_reduce_bias, grad_expand, grad_expand_bias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(revbifpn, CPU, m) {
  m.impl("squeeze_excite_gates", TORCH_BOX(&squeeze_excite_gates_cpu));
  m.impl("norm_act_gates", TORCH_BOX(&norm_act_gates_cpu));
  m.impl("squeeze_excite_gates_backward", TORCH_BOX(&squeeze_excite_gates_backward_cpu));
  m.impl("norm_act_excite_grad", TORCH_BOX(&norm_act_excite_grad_cpu));
}

} // namespace revbifpn
