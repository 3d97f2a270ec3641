// The op of the sampled weight gradient: sample and sums of a gradient by two kernels, and the product with the sample.
#pragma once

#include "ops.h"

namespace semisparse {

// The packed sample of a gradient's transpose and, with_bias, the bias gradient; else an empty tensor.
template <class Device>
TwoBuffers start_sample(Current& current, const Tensor& grad_output, const Optional& seed, bool with_bias) {
  Prepared& prepared = Device::prepared();
  const int32_t device = grad_output.get_device_index();
  const ScalarType type = grad_output.scalar_type();
  const int32_t dtype = dtype_code(type);
  const int64_t tokens = grad_output.size(0), out_features = grad_output.size(1);
  const auto launch = prepared.launches.find(launch_key(LaunchKind::sample, device, dtype, dtype, "", tokens,
                                                        out_features, grad_output.stride(0), seed.has_value(),
                                                        with_bias));
  if (launch == nullptr || grad_output.stride(1) != 1 || !aligned(grad_output.data_ptr())) return std::nullopt;
  if (seed && !(usable<Device>(*seed, ScalarType::Long, device) && seed->dim() == 0)) return std::nullopt;
  const auto& bytes = launch->facts.bytes;
  const int64_t sum_rows = bytes[1] / (4 * out_features);
  std::shared_ptr<Launch> summing;
  if (with_bias) {
    summing = prepared.launches.find(launch_key(LaunchKind::sum_rows, device, dtype_code(ScalarType::Float), dtype, "",
                                                sum_rows, out_features, 0, false, false));
    if (summing == nullptr) return std::nullopt;
  }
  if (!current.enter(device)) return std::nullopt;
  Optional packed = allocate_packed<Device>(launch->facts, 0, device, current.stream);
  Optional sums = allocate<Device>({with_bias ? sum_rows : 0, out_features}, ScalarType::Float, device);
  Optional bias = allocate<Device>({with_bias ? out_features : 0}, type, device);
  if (!packed || !sums || !bias || !aligned(sums->data_ptr()) || !aligned(bias->data_ptr())) return std::nullopt;
  const std::array<void*, 4> addresses{grad_output.data_ptr(), seed ? seed->data_ptr() : nullptr, packed->data_ptr(),
                                       sums->data_ptr()};
  if (!launch->start(prepared.functions, addresses, current.stream)) return std::nullopt;
  const std::array<void*, 2> summed{sums->data_ptr(), bias->data_ptr()};
  if (with_bias && !summing->start(prepared.functions, summed, current.stream)) return std::nullopt;
  return std::make_tuple(std::move(*packed), std::move(*bias));
}

template <class Device>
TwoBuffers start_sampled(Current& current, const Tensor& grad_output, const Tensor& x, const Optional& seed,
                         bool with_bias, std::string_view backend) {
  if (grad_output.dim() != 2 || x.dim() != 2 || x.size(0) != grad_output.size(0) ||
      device_type(grad_output) != Device::type() || x.scalar_type() != grad_output.scalar_type()) {
    return std::nullopt;
  }
  const int64_t tokens = grad_output.size(0), out_features = grad_output.size(1), in_features = x.size(1);
  const auto product = Device::prepared().products.find(
      product_key(ProductKind::sampled, grad_output.get_device_index(), dtype_code(x.scalar_type()), tokens,
                  out_features, in_features, false, backend));
  if (product == nullptr) return std::nullopt;
  auto sample = start_sample<Device>(current, grad_output, seed, with_bias);
  if (!sample) return std::nullopt;
  auto& [packed, bias] = *sample;
  Optional out =
      start_product<Device>(current, *product, packed, x, tokens, std::nullopt, {out_features, in_features});
  if (!out) return std::nullopt;
  return std::make_tuple(std::move(*out), std::move(bias));
}

template <class Device>
std::tuple<Tensor, Tensor> sampled_grad_weight(const Tensor& grad_output, const Tensor& x, Optional seed,
                                               bool with_bias, const Text& backend) {
  auto both = attempted<Device>([&](Current& current) {
    return start_sampled<Device>(current, grad_output, x, seed, with_bias, backend);
  });
  return both ? std::move(*both)
              : two_from_python<Device>("sampled_grad_weight", grad_output, x, seed, with_bias, backend);
}

}  // namespace semisparse
