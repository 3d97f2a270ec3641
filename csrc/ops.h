// The hot ops, for any device whose allocator and foreign functions are given.
//
// An op looks up what Python prepared for such a call, allocates the result, takes the current stream and starts it.
// In every other case (nothing prepared, an operand that does not fit, a refused allocation or launch) it asks the
// Python implementation of the same op, which computes the result, raises the typed error, and prepares the next call.
#pragma once

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "keys.h"
#include "tensors.h"
#include "text.h"

namespace semisparse {

using torch::stable::detail::from;
using torch::stable::detail::to;

inline void ask(const std::string& op, StableIValue* stack) {
  if (torch_call_dispatcher(op.c_str(), "", stack, TORCH_ABI_VERSION) != 0) {
    throw std::runtime_error(op + " could not be called");
  }
}

// Python's ops return a message in addition, as bytes on the CPU: a tensor, because torch 2.11 mistakes the types of
// results that are not all of one type. It is empty where all went well. The exception itself waits for the caller in
// Python (native/fallback.py), because the ABI carries none.
inline void raise_if(const Tensor& message) {
  if (message.numel() == 0) return;
  throw std::runtime_error(std::string(static_cast<const char*>(message.data_ptr()), message.numel()));
}

// An argument for Python's ops.
template <class Argument>
StableIValue given(const Argument& argument) {
  if constexpr (std::is_same_v<Argument, Text>) {
    return from(bytes_of(argument));
  } else {
    return from(argument);
  }
}

// What the Python implementation of an op returns: so many tensors, as a tuple.
template <class Device, size_t... places, class... Arguments>
auto from_python(std::index_sequence<places...>, const char* op, const Arguments&... arguments) {
  constexpr size_t results = sizeof...(places);
  std::array<StableIValue, std::max<size_t>(sizeof...(Arguments), results + 1)> stack{given(arguments)...};
  ask(std::string(Device::library) + "::" + op + "_in_python", stack.data());
  std::tuple found{to<Tensor>(stack[places])...};
  raise_if(to<Tensor>(stack[results]));
  return found;
}

template <class Device, class... Arguments>
void nothing_from_python(const char* op, const Arguments&... arguments) {
  from_python<Device>(std::index_sequence<>{}, op, arguments...);
}

template <class Device, class... Arguments>
Tensor one_from_python(const char* op, const Arguments&... arguments) {
  return std::get<0>(from_python<Device>(std::make_index_sequence<1>{}, op, arguments...));
}

template <class Device, class... Arguments>
std::tuple<Tensor, Tensor> two_from_python(const char* op, const Arguments&... arguments) {
  return from_python<Device>(std::make_index_sequence<2>{}, op, arguments...);
}

template <class Device, class... Arguments>
std::tuple<Tensor, Tensor, Tensor> three_from_python(const char* op, const Arguments&... arguments) {
  return from_python<Device>(std::make_index_sequence<3>{}, op, arguments...);
}

// Whether calls may be started here at all: while something in Python watches them, Python does.
template <class Device>
bool ready() {
  Prepared& prepared = Device::prepared();
  return prepared.connected.load(std::memory_order_acquire) && prepared.watchers.load(std::memory_order_relaxed) == 0;
}

// attempt(current), or nothing where it may not start here, or fails in a way that Python explains better.
template <class Device, class Attempt>
auto attempted(Attempt attempt) -> std::invoke_result_t<Attempt, Current&> {
  try {
    Current current(Device::prepared().functions);
    if (ready<Device>()) return attempt(current);
  } catch (const std::exception&) {
  }
  return std::nullopt;
}

// Whether the codes of a mask can be read for a matrix of these sizes.
template <class Device>
bool fit(const Tensor& codes, int64_t rows, int64_t columns, int32_t device) {
  return usable<Device>(codes, ScalarType::Short, device) && codes.dim() == 2 && codes.size(0) * 4 == rows &&
         codes.size(1) * 4 == columns;
}

using TwoBuffers = std::optional<std::tuple<Tensor, Tensor>>;

// A buffer that the launch does not write has no bytes.
template <class Device>
TwoBuffers start_pack(Current& current, LaunchKind kind, const Tensor& matrix, ScalarType dtype, std::string_view mask,
                      const Optional& codes, const Optional& scale) {
  if (matrix.dim() != 2 || device_type(matrix) != Device::type() || matrix.stride(1) != 1) return std::nullopt;
  const int32_t device = matrix.get_device_index();
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  Prepared& prepared = Device::prepared();
  const auto launch = prepared.launches.find(launch_key(kind, device, dtype_code(matrix.scalar_type()),
                                                        dtype_code(dtype), mask, rows, columns, matrix.stride(0),
                                                        codes.has_value(), scale.has_value()));
  if (launch == nullptr || !aligned(matrix.data_ptr())) return std::nullopt;
  if (codes && !fit<Device>(*codes, rows, columns, device)) return std::nullopt;
  if (scale && !(usable<Device>(*scale, ScalarType::Float, device) && scale->dim() == 0)) return std::nullopt;
  if (!current.enter(device)) return std::nullopt;
  Optional packed = allocate_packed<Device>(launch->facts, 0, device, current.stream);
  Optional packed_t = allocate_packed<Device>(launch->facts, 1, device, current.stream);
  if (!packed || !packed_t) return std::nullopt;
  const std::array<void*, 5> addresses{matrix.data_ptr(), codes ? codes->data_ptr() : nullptr,
                                       scale ? scale->data_ptr() : nullptr, packed->data_ptr(),
                                       packed_t->data_ptr()};
  if (!launch->start(prepared.functions, addresses, current.stream)) return std::nullopt;
  return std::make_tuple(std::move(*packed), std::move(*packed_t));
}

template <class Device>
std::tuple<Tensor, Tensor> pack(const Tensor& matrix, ScalarType dtype, const Text& mask, Optional codes,
                                Optional scale) {
  auto packed = attempted<Device>([&](Current& current) {
    return start_pack<Device>(current, LaunchKind::pack, matrix, dtype, mask, codes, scale);
  });
  return packed ? std::move(*packed) : two_from_python<Device>("pack", matrix, dtype, mask, codes, scale);
}

template <class Device>
Tensor pack_transpose(const Tensor& matrix, ScalarType dtype, const Text& mask, Optional codes, Optional scale) {
  auto packed = attempted<Device>([&](Current& current) {
    return start_pack<Device>(current, LaunchKind::pack_transpose, matrix, dtype, mask, codes, scale);
  });
  return packed ? std::move(std::get<1>(*packed))
                : one_from_python<Device>("pack_transpose", matrix, dtype, mask, codes, scale);
}

template <class Device>
std::tuple<Tensor, Tensor> pack_tokens(const Tensor& x, ScalarType dtype) {
  auto packed = attempted<Device>([&](Current& current) {
    return start_pack<Device>(current, LaunchKind::pack_tokens, x, dtype, "", std::nullopt, std::nullopt);
  });
  return packed ? std::move(*packed) : two_from_python<Device>("pack_tokens", x, dtype);
}

template <class Device>
Optional start_unpack(Current& current, const Tensor& packed, int64_t rows, int64_t columns, ScalarType dtype) {
  Prepared& prepared = Device::prepared();
  const int32_t device = packed.get_device_index();
  const auto launch = prepared.launches.find(launch_key(LaunchKind::unpack, device, 0, dtype_code(dtype), "", rows,
                                                        columns, 0, false, false));
  if (launch == nullptr || !usable<Device>(packed, ScalarType::Byte, device) ||
      packed.numel() < launch->facts.bytes[0]) {
    return std::nullopt;
  }
  if (!current.enter(device)) return std::nullopt;
  Optional matrix = allocate<Device>({rows, columns}, dtype, device);
  if (!matrix || !aligned(matrix->data_ptr())) return std::nullopt;
  const std::array<void*, 2> addresses{packed.data_ptr(), matrix->data_ptr()};
  return launch->start(prepared.functions, addresses, current.stream) ? std::move(matrix) : std::nullopt;
}

template <class Device>
Tensor unpack(const Tensor& packed, int64_t rows, int64_t columns, ScalarType dtype) {
  auto matrix =
      attempted<Device>([&](Current& current) { return start_unpack<Device>(current, packed, rows, columns, dtype); });
  return matrix ? std::move(*matrix) : one_from_python<Device>("unpack", packed, rows, columns, dtype);
}

// D = A B (+ bias) by a plan. Returns false where it cannot be started.
template <class Device>
bool start_sparse(const Current& current, Product& product, const Tensor& packed, const Tensor& b, const Tensor& out,
                  const Optional& bias) {
  Prepared& prepared = Device::prepared();
  const int64_t bytes = product.facts.workspace;
  // Per call: a workspace that is kept would live in a CUDA graph's memory and be overwritten by its replays.
  const Optional workspace = bytes ? allocate<Device>({bytes}, ScalarType::Byte, b.get_device_index()) : out;
  if (!workspace || !product.start(prepared.functions, packed.data_ptr(), b.data_ptr(), out.data_ptr(),
                                   bias ? bias->data_ptr() : nullptr, bytes ? workspace->data_ptr() : nullptr,
                                   current.stream)) {
    return false;
  }
  prepared.started.fetch_add(1, std::memory_order_relaxed);
  return true;
}

// D = left right by torch for e4m3 matrices, the right one column-major, times their scales, which are 1 where they are
// not given. Summed and rounded as gemm/dense.py does. Returns false where it cannot be started.
template <class Device>
bool start_scaled(const Tensor& d, AtenTensorHandle left, AtenTensorHandle right, const Optional& scale_a,
                  const Optional& scale_b) {
  const Functions& functions = Device::prepared().functions;
  if (functions.scaled_mm == nullptr) return false;
  Optional one;
  if (!scale_a || !scale_b) {
    // Per call, as a workspace.
    one = allocate<Device>({}, ScalarType::Float, d.get_device_index());
    if (!one) return false;
    torch::stable::fill_(*one, 1);
  }
  int32_t dtype = -1;
  if (aoti_torch_get_dtype(d.get(), &dtype) != 0) return false;
  return functions.scaled_mm(d.get(), left, right, (scale_a ? *scale_a : *one).get(),
                             (scale_b ? *scale_b : *one).get(), nullptr, nullptr, &dtype, 0) == 0;
}

// D = A B (+ bias) from the unpacked A, with the operands that gemm/dense.py gives to torch's product. Returns false
// where it cannot be started.
template <class Device>
bool start_dense(Current& current, const ProductFacts& facts, const Tensor& packed, const Tensor& b, const Tensor& out,
                 const Optional& bias) {
  const Optional a = start_unpack<Device>(current, packed, facts.a_rows, facts.a_columns, b.scalar_type());
  if (!a) return false;
  // D^T = B^T A^T where the transpose of D is stored.
  const bool turned = facts.d_transposed != 0;
  const Tensor first = as_matrix(*a, facts.a_rows, facts.a_columns, turned);
  const Tensor second = as_matrix(b, facts.b_rows, facts.b_columns, (facts.b_transposed != 0) != turned);
  const Tensor d = as_matrix(out, facts.d_rows, facts.d_columns);
  const auto [left, right] = turned ? std::pair(second.get(), first.get()) : std::pair(first.get(), second.get());
  Prepared& prepared = Device::prepared();
  const Functions& functions = prepared.functions;
  const Optional added = bias ? Optional(alias<1>(*bias, {bias->numel()}, {1})) : std::nullopt;
  const bool started = b.scalar_type() == ScalarType::Float8_e4m3fn
                           ? start_scaled<Device>(d, left, right, std::nullopt, std::nullopt)
                       : added ? functions.addmm(d.get(), added->get(), left, right, 1, 1) == 0
                               : functions.mm(d.get(), left, right) == 0;
  if (!started) return false;
  prepared.started_dense.fetch_add(1, std::memory_order_relaxed);
  return true;
}

// A prepared product, cut down to `sizes`, in out_dtype or else b's. b counts `tokens` rows, which are padded to those
// that the product takes.
template <class Device>
Optional start_product(Current& current, Product& product, const Tensor& packed, const Tensor& b, int64_t tokens,
                       const Optional& bias, const Sizes& sizes, std::optional<ScalarType> out_dtype = std::nullopt) {
  const ProductFacts& facts = product.facts;
  const int32_t device = b.get_device_index();
  const ScalarType dtype = b.scalar_type();
  if (tokens > facts.b_rows || features(b) != facts.b_columns || !usable<Device>(packed, ScalarType::Byte, device) ||
      packed.numel() < facts.packed_bytes) {
    return std::nullopt;
  }
  if (bias && !usable<Device>(*bias, dtype, device)) return std::nullopt;
  if (!current.enter(device)) return std::nullopt;
  const Tensor rows = as_rows(b, tokens, facts.b_rows);
  int64_t entries = 1;
  for (int64_t n = 0; n < sizes.count; ++n) entries *= sizes.values[n];
  const bool whole = entries == facts.d_rows * facts.d_columns;
  Optional out = allocate<Device>(whole ? sizes : Sizes{facts.d_rows, facts.d_columns}, out_dtype.value_or(dtype), device);
  if (!out || !usable<Device>(rows, dtype, device) || !aligned(out->data_ptr())) return std::nullopt;
  const bool started = facts.plan == nullptr ? start_dense<Device>(current, facts, packed, rows, *out, bias)
                                             : start_sparse<Device>(current, product, packed, rows, *out, bias);
  if (!started) return std::nullopt;
  return whole ? out : cut(std::move(*out), sizes);
}

// A product with a packed weight, and the tokens of x that it is for.
struct WeightProduct {
  std::shared_ptr<Product> product;
  int64_t tokens = 0;
};

template <class Device>
WeightProduct find_weight(const Tensor& x, const Optional& bias, int64_t out_features, std::string_view backend) {
  const int64_t in_features = features(x);
  if (in_features == 0 || x.dim() > Sizes::kMost || device_type(x) != Device::type()) return {};
  if (bias && !(bias->dim() == 1 && bias->size(0) == out_features)) return {};
  const int64_t tokens = x.numel() / in_features;
  return {Device::prepared().products.find(product_key(ProductKind::weight, x.get_device_index(),
                                                       dtype_code(x.scalar_type()), tokens, out_features, in_features,
                                                       bias.has_value(), backend)),
          tokens};
}

template <class Device>
Optional start_weight(Current& current, const WeightProduct& found, const Tensor& x, const Tensor& packed,
                      const Optional& bias, int64_t out_features) {
  if (found.product == nullptr) return std::nullopt;
  return start_product<Device>(current, *found.product, packed, x, found.tokens, bias, Sizes(x, out_features));
}

template <class Device>
Tensor packed_matmul(const Tensor& x, const Tensor& packed, Optional bias, int64_t out_features,
                     const Text& backend) {
  auto out = attempted<Device>([&](Current& current) {
    const WeightProduct found = find_weight<Device>(x, bias, out_features, backend);
    return start_weight<Device>(current, found, x, packed, bias, out_features);
  });
  return out ? std::move(*out) : one_from_python<Device>("packed_matmul", x, packed, bias, out_features, backend);
}

template <class Device>
TwoBuffers start_pack_linear(Current& current, const Tensor& x, const Tensor& weight, const Optional& bias,
                             std::string_view mask, const Optional& codes, const Optional& scale,
                             std::string_view backend) {
  if (weight.dim() != 2 || features(x) != weight.size(1)) return std::nullopt;
  const WeightProduct found = find_weight<Device>(x, bias, weight.size(0), backend);
  if (found.product == nullptr) return std::nullopt;
  auto packed = start_pack<Device>(current, LaunchKind::pack, weight, x.scalar_type(), mask, codes, scale);
  if (!packed) return std::nullopt;
  auto& [matrix, transposed] = *packed;
  Optional y = start_weight<Device>(current, found, x, matrix, bias, weight.size(0));
  if (!y) return std::nullopt;
  return std::make_tuple(std::move(*y), transposed.numel() ? std::move(transposed) : std::move(matrix));
}

template <class Device>
std::tuple<Tensor, Tensor> pack_linear(const Tensor& x, const Tensor& weight, Optional bias, const Text& mask,
                                       Optional codes, Optional scale, const Text& backend) {
  auto both = attempted<Device>([&](Current& current) {
    return start_pack_linear<Device>(current, x, weight, bias, mask, codes, scale, backend);
  });
  return both ? std::move(*both)
              : two_from_python<Device>("pack_linear", x, weight, bias, mask, codes, scale, backend);
}

template <class Device>
Optional start_tokens(Current& current, const Tensor& packed, const Tensor& weight, const Optional& bias,
                      int64_t tokens, std::string_view backend) {
  if (weight.dim() != 2 || device_type(weight) != Device::type()) return std::nullopt;
  Prepared& prepared = Device::prepared();
  const int32_t device = weight.get_device_index(), dtype = dtype_code(weight.scalar_type());
  const int64_t out_features = weight.size(0);
  const auto product = prepared.products.find(
      product_key(ProductKind::tokens, device, dtype, tokens, out_features, weight.size(1), false, backend));
  if (product == nullptr) return std::nullopt;
  std::shared_ptr<Launch> adding;
  if (bias) {
    // The bias lies along the rows here, where the product adds none: a kernel of ours does, in place.
    adding = prepared.launches.find(launch_key(LaunchKind::add_bias, device, dtype, dtype, "", tokens, out_features, 0,
                                               false, false));
    if (adding == nullptr || !usable<Device>(*bias, weight.scalar_type(), device) || bias->dim() != 1 ||
        bias->size(0) != out_features) {
      return std::nullopt;
    }
  }
  Optional out =
      start_product<Device>(current, *product, packed, weight, out_features, std::nullopt, {tokens, out_features});
  if (!out || !bias) return out;
  const std::array<void*, 2> addresses{out->data_ptr(), bias->data_ptr()};
  return adding->start(prepared.functions, addresses, current.stream) ? std::move(out) : std::nullopt;
}

template <class Device>
Tensor packed_tokens_matmul(const Tensor& packed, const Tensor& weight, Optional bias, int64_t tokens,
                            const Text& backend) {
  auto out = attempted<Device>(
      [&](Current& current) { return start_tokens<Device>(current, packed, weight, bias, tokens, backend); });
  return out ? std::move(*out)
             : one_from_python<Device>("packed_tokens_matmul", packed, weight, bias, tokens, backend);
}

template <class Device>
Optional start_grad_weight(Current& current, const Tensor& packed_t, const Tensor& grad_output, int64_t in_features,
                           std::string_view backend) {
  if (grad_output.dim() != 2 || device_type(grad_output) != Device::type()) return std::nullopt;
  const auto product = Device::prepared().products.find(
      product_key(ProductKind::grad_weight, grad_output.get_device_index(), dtype_code(grad_output.scalar_type()),
                  grad_output.size(0), grad_output.size(1), in_features, false, backend));
  if (product == nullptr) return std::nullopt;
  return start_product<Device>(current, *product, packed_t, grad_output, grad_output.size(0), std::nullopt,
                               {grad_output.size(1), in_features});
}

template <class Device>
Tensor packed_tokens_grad_weight(const Tensor& packed_t, const Tensor& grad_output, int64_t in_features,
                                 const Text& backend) {
  auto out = attempted<Device>([&](Current& current) {
    return start_grad_weight<Device>(current, packed_t, grad_output, in_features, backend);
  });
  return out ? std::move(*out)
             : one_from_python<Device>("packed_tokens_grad_weight", packed_t, grad_output, in_features, backend);
}

}  // namespace semisparse
