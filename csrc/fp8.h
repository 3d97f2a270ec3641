// The ops of fp8: matrices rounded to e4m3, pruned and packed in it, their products, and the scale of a product.
#pragma once

#include "ops.h"

namespace semisparse {

using ThreeTensors = std::optional<std::tuple<Tensor, Tensor, Tensor>>;

// The launch of a kind for a matrix that kernels read as it is; none where that is not prepared.
template <class Device>
std::shared_ptr<Launch> launch_for(LaunchKind kind, const Tensor& matrix, std::string_view mask, bool first,
                                   bool second) {
  if (matrix.dim() != 2 || device_type(matrix) != Device::type() || matrix.stride(1) != 1 ||
      !aligned(matrix.data_ptr())) {
    return nullptr;
  }
  return Device::prepared().launches.find(launch_key(kind, matrix.get_device_index(),
                                                     dtype_code(matrix.scalar_type()), 0, mask, matrix.size(0),
                                                     matrix.size(1), matrix.stride(0), first, second));
}

// Largest magnitudes of the parts of a matrix, as ops/fp8.py's largest_of gives them.
template <class Device>
Optional start_largest(Current& current, const Tensor& matrix) {
  const auto launch = launch_for<Device>(LaunchKind::largest, matrix, "", false, false);
  const int32_t device = matrix.get_device_index();
  if (launch == nullptr || !current.enter(device)) return std::nullopt;
  Optional largest = allocate<Device>({launch->facts.bytes[0] / 4}, ScalarType::Int, device);
  if (!largest || !aligned(largest->data_ptr())) return std::nullopt;
  const std::array<void*, 2> addresses{matrix.data_ptr(), largest->data_ptr()};
  return launch->start(Device::prepared().functions, addresses, current.stream) ? std::move(largest) : std::nullopt;
}

template <class Device>
ThreeTensors start_quantise(Current& current, const Tensor& x, bool rows, bool columns) {
  const auto launch = launch_for<Device>(LaunchKind::quantise, x, "", rows, columns);
  if (launch == nullptr) return std::nullopt;
  const Optional largest = start_largest<Device>(current, x);
  if (!largest) return std::nullopt;
  const int32_t device = x.get_device_index();
  const int64_t features = x.size(1);
  const auto& bytes = launch->facts.bytes;
  const auto shape = [](bool wanted, int64_t height, int64_t width) {
    return wanted ? Sizes{height, width} : Sizes{0};
  };
  Optional x8 = allocate<Device>(shape(rows, bytes[0] / features, features), ScalarType::Float8_e4m3fn, device);
  Optional x8t = allocate<Device>(shape(columns, features, bytes[1] / features), ScalarType::Float8_e4m3fn, device);
  Optional scale = allocate<Device>({}, ScalarType::Float, device);
  if (!x8 || !x8t || !scale || !aligned(x8->data_ptr()) || !aligned(x8t->data_ptr()) ||
      !aligned(scale->data_ptr())) {
    return std::nullopt;
  }
  const std::array<void*, 5> addresses{x.data_ptr(), largest->data_ptr(), x8->data_ptr(), x8t->data_ptr(),
                                       scale->data_ptr()};
  if (!launch->start(Device::prepared().functions, addresses, current.stream)) return std::nullopt;
  return std::make_tuple(std::move(*x8), std::move(*x8t), std::move(*scale));
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> quantise(const Tensor& x, bool rows, bool columns) {
  auto rounded =
      attempted<Device>([&](Current& current) { return start_quantise<Device>(current, x, rows, columns); });
  return rounded ? std::move(*rounded) : three_from_python<Device>("quantise", x, rows, columns);
}

template <class Device>
ThreeTensors start_pack_fp8(Current& current, const Tensor& weight, std::string_view mask, const Optional& codes) {
  const auto launch = launch_for<Device>(LaunchKind::pack_fp8, weight, mask, codes.has_value(), false);
  if (launch == nullptr) return std::nullopt;
  const int32_t device = weight.get_device_index();
  if (codes && !fit<Device>(*codes, weight.size(0), weight.size(1), device)) return std::nullopt;
  const Optional largest = start_largest<Device>(current, weight);
  if (!largest) return std::nullopt;
  Optional packed = allocate_packed<Device>(launch->facts, 0, device, current.stream);
  Optional packed_t = allocate_packed<Device>(launch->facts, 1, device, current.stream);
  Optional scale = allocate<Device>({}, ScalarType::Float, device);
  if (!packed || !packed_t || !scale || !aligned(scale->data_ptr())) return std::nullopt;
  const std::array<void*, 6> addresses{weight.data_ptr(), codes ? codes->data_ptr() : nullptr, largest->data_ptr(),
                                       scale->data_ptr(), packed->data_ptr(), packed_t->data_ptr()};
  if (!launch->start(Device::prepared().functions, addresses, current.stream)) return std::nullopt;
  return std::make_tuple(std::move(*packed), std::move(*packed_t), std::move(*scale));
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> pack_fp8(const Tensor& weight, const Text& mask, Optional codes) {
  auto packed =
      attempted<Device>([&](Current& current) { return start_pack_fp8<Device>(current, weight, mask, codes); });
  return packed ? std::move(*packed) : three_from_python<Device>("pack_fp8", weight, mask, codes);
}

template <class Device>
Tensor unpack_fp8(const Tensor& packed, int64_t rows, int64_t columns) {
  auto matrix = attempted<Device>([&](Current& current) {
    return start_unpack<Device>(current, packed, rows, columns, ScalarType::Float8_e4m3fn);
  });
  return matrix ? std::move(*matrix) : one_from_python<Device>("unpack_fp8", packed, rows, columns);
}

template <class Device>
Optional start_fp8_product(Current& current, const Tensor& x8, const Tensor& packed, int64_t out_features,
                           std::string_view backend, ScalarType out_dtype) {
  if (x8.dim() != 2 || device_type(x8) != Device::type() || x8.scalar_type() != ScalarType::Float8_e4m3fn) {
    return std::nullopt;
  }
  const int64_t tokens = x8.size(0);
  const auto product = Device::prepared().products.find(
      product_key(ProductKind::fp8, x8.get_device_index(), dtype_code(out_dtype), tokens, out_features, x8.size(1),
                  false, backend));
  if (product == nullptr) return std::nullopt;
  return start_product<Device>(current, *product, packed, x8, tokens, std::nullopt, {tokens, out_features},
                               out_dtype);
}

template <class Device>
Tensor fp8_product(const Tensor& x8, const Tensor& packed, int64_t out_features, const Text& backend,
                   ScalarType out_dtype) {
  auto sums = attempted<Device>([&](Current& current) {
    return start_fp8_product<Device>(current, x8, packed, out_features, backend, out_dtype);
  });
  return sums ? std::move(*sums)
              : one_from_python<Device>("fp8_product", x8, packed, out_features, backend, out_dtype);
}

// A scale as kernels read it.
template <class Device>
bool is_scale(const Tensor& scale, int32_t device) {
  return usable<Device>(scale, ScalarType::Float, device) && scale.numel() == 1;
}

template <class Device>
Optional start_dense_product(Current& current, const Tensor& a8, const Tensor& b8, ScalarType out_dtype,
                             const Optional& scale_a, const Optional& scale_b) {
  constexpr int64_t kMultiple = 16;  // of the sizes that cuBLASLt takes
  if (a8.dim() != 2 || b8.dim() != 2 || device_type(a8) != Device::type()) return std::nullopt;
  const int32_t device = a8.get_device_index();
  const int64_t rows = a8.size(0), reduction = a8.size(1), columns = b8.size(0);
  if (!usable<Device>(a8, ScalarType::Float8_e4m3fn, device) ||
      !usable<Device>(b8, ScalarType::Float8_e4m3fn, device) || b8.size(1) != reduction || a8.numel() == 0 ||
      b8.numel() == 0 || reduction % kMultiple || columns % kMultiple) {
    return std::nullopt;
  }
  if ((scale_a && !is_scale<Device>(*scale_a, device)) || (scale_b && !is_scale<Device>(*scale_b, device))) {
    return std::nullopt;
  }
  if (!current.enter(device)) return std::nullopt;
  Optional out = allocate<Device>({rows, columns}, out_dtype, device);
  if (!out) return std::nullopt;
  const Tensor left = as_matrix(a8, rows, reduction), right = as_matrix(b8, columns, reduction, true);
  const bool started = start_scaled<Device>(*out, left.get(), right.get(), scale_a, scale_b);
  return started ? std::move(out) : std::nullopt;
}

template <class Device>
Tensor fp8_dense_product(const Tensor& a8, const Tensor& b8, ScalarType out_dtype, Optional scale_a,
                         Optional scale_b) {
  auto out = attempted<Device>([&](Current& current) {
    return start_dense_product<Device>(current, a8, b8, out_dtype, scale_a, scale_b);
  });
  return out ? std::move(*out)
             : one_from_python<Device>("fp8_dense_product", a8, b8, out_dtype, scale_a, scale_b);
}

// y times its scales plus bias into `into`, or into a new tensor of `rows` rows.
template <class Device>
Optional start_rescale(Current& current, const Tensor& y, const Tensor& scale_a, const Tensor& scale_b,
                       const Optional& bias, int64_t rows, ScalarType dtype, const Optional& into) {
  if (y.dim() != 2 || device_type(y) != Device::type() || y.size(0) < rows) return std::nullopt;
  const int32_t device = y.get_device_index();
  const int64_t columns = y.size(1);
  const int64_t bias_dtype = bias ? dtype_code(bias->scalar_type()) : 0;
  Prepared& prepared = Device::prepared();
  const auto launch = prepared.launches.find(launch_key(LaunchKind::rescale, device, dtype_code(y.scalar_type()),
                                                        dtype_code(dtype), "", rows, columns, bias_dtype,
                                                        bias.has_value(), false));
  if (launch == nullptr || !usable<Device>(y, y.scalar_type(), device) || !is_scale<Device>(scale_a, device) ||
      !is_scale<Device>(scale_b, device)) {
    return std::nullopt;
  }
  if (bias && !(usable<Device>(*bias, bias->scalar_type(), device) && bias->dim() == 1 && bias->size(0) == columns)) {
    return std::nullopt;
  }
  if (!current.enter(device)) return std::nullopt;
  Optional out = into ? into : allocate<Device>({rows, columns}, dtype, device);
  if (!out || !aligned(out->data_ptr())) return std::nullopt;
  const std::array<void*, 5> addresses{y.data_ptr(), scale_a.data_ptr(), scale_b.data_ptr(),
                                       bias ? bias->data_ptr() : nullptr, out->data_ptr()};
  return launch->start(prepared.functions, addresses, current.stream) ? std::move(out) : std::nullopt;
}

template <class Device>
Tensor rescale(const Tensor& y, const Tensor& scale_a, const Tensor& scale_b, Optional bias, int64_t rows,
               ScalarType dtype) {
  auto out = attempted<Device>([&](Current& current) {
    return start_rescale<Device>(current, y, scale_a, scale_b, bias, rows, dtype, std::nullopt);
  });
  return out ? std::move(*out) : one_from_python<Device>("rescale", y, scale_a, scale_b, bias, rows, dtype);
}

template <class Device>
void rescale_in_place(const Tensor& y, const Tensor& scale_a, const Tensor& scale_b, Optional bias) {
  const auto out = attempted<Device>([&](Current& current) -> Optional {
    if (y.dim() != 2) return std::nullopt;
    return start_rescale<Device>(current, y, scale_a, scale_b, bias, y.size(0), y.scalar_type(), y);
  });
  if (!out) nothing_from_python<Device>("rescale_", y, scale_a, scale_b, bias);
}

}  // namespace semisparse
