// Strings of a call, by handles of the stable ABI.
//
// Not as std::string: to 2.13, torch's conversion of a string argument leaks one per call, in the headers (pytorch issue
// 191340) and, for calls by torch_call_dispatcher, in libtorch itself. Strings for Python therefore go as bytes.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace semisparse {

// A string argument of an op, freed with this object.
class Text {
 public:
  explicit Text(StringHandle handle) : handle_(handle) {}
  Text(Text&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Text& operator=(Text&&) = delete;
  ~Text() {
    if (handle_ != nullptr) torch_delete_string(handle_);
  }

  operator std::string_view() const {
    const char* letters = nullptr;
    size_t count = 0;
    if (torch_string_c_str(handle_, &letters) != 0 || torch_string_length(handle_, &count) != 0) return {};
    return {letters, count};
  }

 private:
  StringHandle handle_;
};

// A text as a tensor of bytes on the CPU.
inline torch::stable::Tensor bytes_of(std::string_view text) {
  const int64_t size = static_cast<int64_t>(text.size()), stride = 1;
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), -1, &made) !=
      0) {
    throw std::runtime_error("no memory for a text");
  }
  torch::stable::Tensor bytes(made);
  if (size > 0) std::memcpy(bytes.data_ptr(), text.data(), text.size());
  return bytes;
}

}  // namespace semisparse

HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)

template <>
struct ToImpl<semisparse::Text> {
  static semisparse::Text call(StableIValue value, uint64_t, bool) {
    return semisparse::Text(to<StringHandle>(value));
  }
};

HIDDEN_NAMESPACE_END(torch, stable, detail)
