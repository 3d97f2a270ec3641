// Tensors by LibTorch's stable ABI: checks that answer yes or no, and allocation.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

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

inline bool packs_as(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

// Whether the kernels and cuSPARSELt can use this tensor as it is.
template <class Device>
bool usable(const Tensor& tensor, ScalarType dtype, int32_t device) {
  return device_type(tensor) == Device::type() && tensor.get_device_index() == device &&
         tensor.scalar_type() == dtype && tensor.is_contiguous() && aligned(tensor.data_ptr());
}

// A contiguous tensor, uninitialised; none where the allocation fails.
template <class Device, size_t dimensions>
Optional allocate(const std::array<int64_t, dimensions>& sizes, ScalarType dtype, int32_t device) {
  std::array<int64_t, dimensions> strides;
  int64_t step = 1;
  for (size_t n = dimensions; n-- > 0;) {
    strides[n] = step;
    step *= sizes[n];
  }
  AtenTensorHandle made = nullptr;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  if (aoti_torch_empty_strided(static_cast<int64_t>(dimensions), sizes.data(), strides.data(), code, Device::type(),
                               device, &made) != 0) {
    return std::nullopt;
  }
  return Tensor(made);
}

// The matrix with rows of zeros up to `rows`, contiguous: itself where it is that already.
inline Tensor with_rows(const Tensor& matrix, int64_t rows) {
  const int64_t missing = rows - matrix.size(0);
  if (missing == 0) return matrix.is_contiguous() ? matrix : torch::stable::contiguous(matrix);
  const std::array<int64_t, 4> around{0, 0, 0, missing};
  return torch::stable::pad(matrix, {around.data(), around.size()});
}

// Makes a device current for a scope.
class Guard {
 public:
  Guard(const Functions& functions, int32_t device) : functions_(functions) {
    open = functions_.open_guard(device, &guard_) == 0;
  }
  ~Guard() {
    if (open) functions_.close_guard(guard_);
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
  bool open = false;

 private:
  const Functions& functions_;
  void* guard_ = nullptr;
};

}  // namespace semisparse
