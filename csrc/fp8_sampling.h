// The ops of the sampled weight gradient in fp8: the sample with all else that is made of a gradient in one pass, the
// product with it, and both ways to a weight gradient.
#pragma once

#include "fp8.h"

namespace semisparse {

constexpr int64_t kTokens = 32, kDenseTokens = 16;  // tokens of a sample are padded to a multiple, and those of dense operands

inline int64_t rounded_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

// As sample_fp8 returns it.
using Fp8Sample = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
std::optional<Fp8Sample> start_sample_fp8(Current& current, const Tensor& grad_output, const Optional& seed, bool rows,
                                          std::optional<ScalarType> bias_dtype) {
  if (grad_output.dim() != 2 || device_type(grad_output) != Device::type() || grad_output.stride(1) != 1 ||
      !aligned(grad_output.data_ptr())) {
    return std::nullopt;
  }
  Prepared& prepared = Device::prepared();
  const int32_t device = grad_output.get_device_index();
  const ScalarType type = grad_output.scalar_type();
  const int64_t tokens = grad_output.size(0), out_features = grad_output.size(1);
  const auto launch = prepared.launches.find(
      launch_key(LaunchKind::sample_fp8, device, dtype_code(type), rows ? dtype_code(ScalarType::Float8_e4m3fn) : 0, "",
                 tokens, out_features, grad_output.stride(0), seed.has_value(), bias_dtype.has_value()));
  if (launch == nullptr) return std::nullopt;
  if (seed && !(usable<Device>(*seed, ScalarType::Long, device) && seed->dim() == 0)) return std::nullopt;
  const auto& bytes = launch->facts.bytes;
  const int64_t sum_rows = bytes[1] / (4 * out_features);
  std::shared_ptr<Launch> summing;
  if (bias_dtype) {
    summing = prepared.launches.find(launch_key(LaunchKind::sum_rows, device, dtype_code(ScalarType::Float),
                                                dtype_code(*bias_dtype), "", sum_rows, out_features, 0, false, false));
    if (summing == nullptr) return std::nullopt;
  }
  const Optional largest = start_largest<Device>(current, grad_output);
  if (!largest) return std::nullopt;
  const Sizes of_rows = rows ? Sizes{rounded_up(tokens, kTokens), out_features} : Sizes{0};
  Optional dy8 = allocate<Device>(of_rows, ScalarType::Float8_e4m3fn, device);
  Optional packed = allocate_packed<Device>(launch->facts, 0, device, current.stream);
  Optional sums = allocate<Device>({bias_dtype ? sum_rows : 0, out_features}, ScalarType::Float, device);
  Optional bias = allocate<Device>({bias_dtype ? out_features : 0}, bias_dtype.value_or(type), device);
  Optional scale = allocate<Device>({}, ScalarType::Float, device);
  Optional scale_sample = allocate<Device>({}, ScalarType::Float, device);
  for (const Optional* made : {&dy8, &packed, &sums, &bias, &scale, &scale_sample}) {
    if (!*made || !aligned((*made)->data_ptr())) return std::nullopt;
  }
  const std::array<void*, 8> addresses{grad_output.data_ptr(), seed ? seed->data_ptr() : nullptr,
                                       largest->data_ptr(), dy8->data_ptr(), packed->data_ptr(), sums->data_ptr(),
                                       scale->data_ptr(), scale_sample->data_ptr()};
  if (!launch->start(prepared.functions, addresses, current.stream)) return std::nullopt;
  const std::array<void*, 2> summed{sums->data_ptr(), bias->data_ptr()};
  if (summing != nullptr && !summing->start(prepared.functions, summed, current.stream)) return std::nullopt;
  return Fp8Sample{std::move(*dy8), std::move(*packed), std::move(*bias), std::move(*scale), std::move(*scale_sample)};
}

template <class Device>
Fp8Sample sample_fp8(const Tensor& grad_output, Optional seed, bool rows, std::optional<ScalarType> bias_dtype) {
  auto sample = attempted<Device>([&](Current& current) {
    return start_sample_fp8<Device>(current, grad_output, seed, rows, bias_dtype);
  });
  return sample ? std::move(*sample)
                : from_python<Device>(std::make_index_sequence<5>{}, "sample_fp8", grad_output, seed, rows, bias_dtype);
}

// The product of a sample with x^T in e4m3; none where it is not prepared, as where x^T would have to be padded.
template <class Device>
std::shared_ptr<Product> find_fp8_sampled(const Tensor& x8t, int64_t out_features, std::string_view backend,
                                          ScalarType out_dtype) {
  if (x8t.dim() != 2 || device_type(x8t) != Device::type() || x8t.scalar_type() != ScalarType::Float8_e4m3fn) {
    return nullptr;
  }
  return Device::prepared().products.find(product_key(ProductKind::fp8_sampled, x8t.get_device_index(),
                                                      dtype_code(out_dtype), x8t.size(1), out_features, x8t.size(0),
                                                      false, backend));
}

template <class Device>
Tensor fp8_sampled_product(const Tensor& packed, const Tensor& x8t, int64_t out_features, const Text& backend,
                           ScalarType out_dtype) {
  auto sums = attempted<Device>([&](Current& current) -> Optional {
    const auto product = find_fp8_sampled<Device>(x8t, out_features, backend, out_dtype);
    if (product == nullptr) return std::nullopt;
    const int64_t in_features = x8t.size(0);
    return start_product<Device>(current, *product, packed, x8t, in_features, std::nullopt,
                                 {out_features, in_features}, out_dtype);
  });
  return sums ? std::move(*sums)
              : one_from_python<Device>("fp8_sampled_product", packed, x8t, out_features, backend, out_dtype);
}

// dW, the bias gradient, and the gradient in e4m3 with its scale.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What both ways to a weight gradient take.
struct GradientCall {
  const Tensor &grad_output, &x8t, &scale_x;
  const Optional& seed;
  bool rows;
  std::optional<ScalarType> bias_dtype;
  std::string_view backend;
  ScalarType dtype;
};

template <class Device>
std::optional<Gradients> start_sampled_way(Current& current, const GradientCall& call) {
  const int64_t out_features = call.grad_output.size(1), in_features = call.x8t.size(0);
  const ScalarType wide = call.dtype == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  const auto product = find_fp8_sampled<Device>(call.x8t, out_features, call.backend, wide);
  if (product == nullptr) return std::nullopt;
  auto sample = start_sample_fp8<Device>(current, call.grad_output, call.seed, call.rows, call.bias_dtype);
  if (!sample) return std::nullopt;
  auto& [dy8, packed, bias, scale, scale_sample] = *sample;
  const Optional sums = start_product<Device>(current, *product, packed, call.x8t, in_features, std::nullopt,
                                              {out_features, in_features}, wide);
  if (!sums) return std::nullopt;
  Optional grad_weight = start_rescale<Device>(current, *sums, scale_sample, call.scale_x, std::nullopt, out_features,
                                               call.dtype, wide == call.dtype ? sums : std::nullopt);
  if (!grad_weight) return std::nullopt;
  return Gradients{std::move(*grad_weight), std::move(bias), std::move(dy8), std::move(scale)};
}

template <class Device>
std::optional<Gradients> start_whole_way(Current& current, const GradientCall& call) {
  auto rounded = start_quantise<Device>(current, call.grad_output, call.rows, true);
  if (!rounded) return std::nullopt;
  auto& [dy8, dy8t, scale] = *rounded;
  Optional grad_weight =
      start_dense_product<Device>(current, dy8t, call.x8t, call.dtype, Optional(scale), Optional(call.scale_x));
  if (!grad_weight) return std::nullopt;
  const Tensor& dy = call.grad_output;
  static constexpr std::array<int64_t, 1> kTokenAxis{0};
  // Not of dy itself, which may have autograd state.
  Optional bias = call.bias_dtype
                      ? torch::stable::sum(alias<2>(dy, {dy.size(0), dy.size(1)}, {dy.stride(0), 1}),
                                           torch::headeronly::IntHeaderOnlyArrayRef(kTokenAxis.data(), 1), false,
                                           call.bias_dtype)
                      : allocate<Device>({0}, dy.scalar_type(), dy.get_device_index());
  if (!bias) return std::nullopt;
  return Gradients{std::move(*grad_weight), std::move(*bias), std::move(dy8), std::move(scale)};
}

template <class Device>
std::optional<Gradients> start_gradients(Current& current, const GradientCall& call) {
  const Tensor& dy = call.grad_output;
  if (dy.dim() != 2 || call.x8t.dim() != 2 || device_type(dy) != Device::type()) return std::nullopt;
  const int32_t device = dy.get_device_index();
  if (!usable<Device>(call.x8t, ScalarType::Float8_e4m3fn, device) || !is_scale<Device>(call.scale_x, device) ||
      call.x8t.size(1) != rounded_up(dy.size(0), kDenseTokens)) {
    return std::nullopt;
  }
  if (call.backend == "auto") {
    const auto chosen = [&](ProductKind way) {
      const int32_t dtypes = dtype_code(call.dtype) | dtype_code(dy.scalar_type()) << 8;
      return Device::prepared().products.find(product_key(way, device, dtypes, dy.size(0), dy.size(1),
                                                          call.x8t.size(0), call.bias_dtype.has_value(),
                                                          call.backend)) != nullptr;
    };
    if (chosen(ProductKind::whole_way)) return start_whole_way<Device>(current, call);
    if (!chosen(ProductKind::sampled_way)) return std::nullopt;
  }
  return start_sampled_way<Device>(current, call);
}

template <class Device>
Gradients fp8_sampled_grad_weight(const Tensor& grad_output, const Tensor& x8t, const Tensor& scale_x, Optional seed,
                                  bool rows, std::optional<ScalarType> bias_dtype, const Text& backend,
                                  ScalarType dtype) {
  auto gradients = attempted<Device>([&](Current& current) {
    return start_gradients<Device>(current,
                                   {grad_output, x8t, scale_x, seed, rows, bias_dtype, backend, dtype});
  });
  return gradients ? std::move(*gradients)
                   : from_python<Device>(std::make_index_sequence<4>{}, "fp8_sampled_grad_weight", grad_output, x8t,
                                         scale_x, seed, rows, bias_dtype, backend, dtype);
}

}  // namespace semisparse
