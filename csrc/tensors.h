// Tensors by LibTorch's stable ABI: checks that answer yes or no, and allocation.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <vector>

#include "prepared.h"

namespace semisparse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kAlignment == 0; }

inline int32_t device_type(const Tensor& tensor) {
  int32_t type = -1;
  return aoti_torch_get_device_type(tensor.get(), &type) == 0 ? type : -1;
}

inline int32_t dtype_code(ScalarType dtype) { return static_cast<int32_t>(dtype); }

// Whether the kernels and cuSPARSELt can use this tensor as it is.
template <class Device>
bool usable(const Tensor& tensor, ScalarType dtype, int32_t device) {
  return device_type(tensor) == Device::type() && tensor.get_device_index() == device &&
         tensor.scalar_type() == dtype && tensor.is_contiguous() && aligned(tensor.data_ptr());
}

// Sizes of a tensor, without an allocation.
struct Sizes {
  static constexpr int64_t kMost = 8;
  int64_t count = 0;
  std::array<int64_t, kMost> values{};

  Sizes(std::initializer_list<int64_t> sizes) {
    for (int64_t size : sizes) values[count++] = size;
  }
  // Of x, with another last size. Only for tensors of at most kMost dimensions.
  Sizes(const Tensor& x, int64_t last) : count(x.dim()) {
    const auto sizes = x.sizes();
    for (int64_t n = 0; n + 1 < count; ++n) values[n] = sizes[n];
    values[count - 1] = last;
  }
};

// A contiguous tensor, uninitialised; none where the allocation fails.
template <class Device>
Optional allocate(const Sizes& sizes, ScalarType dtype, int32_t device) {
  std::array<int64_t, Sizes::kMost> strides;
  int64_t step = 1;
  for (int64_t n = sizes.count; n-- > 0;) {
    strides[n] = step;
    step *= sizes.values[n];
  }
  AtenTensorHandle made = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  if (aoti_torch_empty_strided(sizes.count, sizes.values.data(), strides.data(), code, Device::type(), device,
                               &made) != 0) {
    return std::nullopt;
  }
  return Tensor(made);
}

// A buffer that a launch packs a matrix into, its end padded; none where that fails. The launch's device was entered.
template <class Device>
Optional allocate_packed(const LaunchFacts& facts, int which, int32_t device, void* stream) {
  const int64_t bytes = facts.bytes[which], behind = facts.behind[which];
  Optional packed = allocate<Device>({bytes}, ScalarType::Byte, device);
  if (!packed || !aligned(packed->data_ptr())) return std::nullopt;
  if (behind == 0) return packed;
  const uint64_t end = reinterpret_cast<uint64_t>(packed->data_ptr()) + static_cast<uint64_t>(bytes);
  const bool filled = Device::prepared().functions.fill(end - behind, kPadding, behind, stream) == 0;
  return filled ? std::move(packed) : std::nullopt;
}

// The last size, 0 where there is none.
inline int64_t features(const Tensor& x) { return x.dim() == 0 ? 0 : x.size(x.dim() - 1); }

// x as a matrix of rows with the last size, and with rows of zeros up to `rows`; contiguous. x itself where it is that.
inline Tensor as_rows(const Tensor& x, int64_t tokens, int64_t rows) {
  Tensor whole = x.is_contiguous() ? x : torch::stable::contiguous(x);
  if (tokens == rows) return whole;
  if (whole.dim() != 2) whole = torch::stable::view(whole, {tokens, features(x)});
  const std::array<int64_t, 4> around{0, 0, 0, rows - tokens};
  return torch::stable::pad(whole, {around.data(), around.size()});
}

// Cuts a fresh tensor down to sizes, which are its first entries. Not by a view: autograd refuses writes to views that
// were made where it does not look.
inline Tensor cut(Tensor fresh, const Sizes& sizes) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(fresh),
      torch::stable::detail::from(std::vector<int64_t>(sizes.values.begin(), sizes.values.begin() + sizes.count)),
      torch::stable::detail::from(std::nullopt)};
  if (torch_call_dispatcher("aten::resize_", "", stack.data(), TORCH_ABI_VERSION) != 0) {
    throw std::runtime_error("aten::resize_ failed");
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A tensor's memory with other sizes and strides. The result has no autograd state, whatever the tensor has.
template <size_t dimensions>
Tensor alias(const Tensor& tensor, std::array<int64_t, dimensions> sizes, std::array<int64_t, dimensions> strides) {
  AtenTensorHandle made = nullptr;
  if (aoti_torch__reinterpret_tensor(tensor.get(), dimensions, sizes.data(), strides.data(), 0, &made) != 0) {
    throw std::runtime_error("a tensor has no alias");
  }
  return Tensor(made);
}

// A contiguous tensor as a matrix, or as the transpose of one, without autograd state.
inline Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t columns, bool transposed = false) {
  return transposed ? alias<2>(tensor, {columns, rows}, {1, columns}) : alias<2>(tensor, {rows, columns}, {columns, 1});
}

// Device and stream of one call of an op. The device is current from the first enter() until this object ends.
class Current {
 public:
  explicit Current(const Functions& functions) : functions_(functions) {}
  ~Current() {
    if (guard_ != nullptr) functions_.close_guard(guard_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  // Makes a device current and finds its stream. False where that fails, or where another device was entered before.
  bool enter(int32_t device) {
    if (guard_ == nullptr) {
      if (functions_.open_guard(device, &guard_) != 0) return false;
      device_ = device;
      found_ = functions_.current_stream(device, &stream) == 0;
    }
    return found_ && device == device_;
  }

  void* stream = nullptr;

 private:
  const Functions& functions_;
  void* guard_ = nullptr;
  int32_t device_ = -1;
  bool found_ = false;
};

}  // namespace semisparse
