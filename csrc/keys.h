// The keys of what is prepared. Calls and Python's registrations build them by the same functions.
#pragma once

#include <cstdint>
#include <string_view>

#include "prepared.h"

namespace semisparse {

enum class ProductKind : int64_t {
  weight = 0, tokens = 1, grad_weight = 2, sampled = 3, fp8 = 4, fp8_sampled = 5,
  // Not products: which way leads to a weight gradient in fp8 with backend "auto".
  sampled_way = 6, whole_way = 7
};
enum class LaunchKind : int64_t {
  pack = 0, pack_tokens = 1, unpack = 2, add_bias = 3, sample = 4, sum_rows = 5, pack_transpose = 6,
  largest = 7, quantise = 8, pack_fp8 = 9, rescale = 10, sample_fp8 = 11
};

// A short name as a number.
inline int64_t named(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (unsigned char letter : name) hash = (hash ^ letter) * 0x100000001b3ull;
  return static_cast<int64_t>(hash);
}

// Plans belong to the thread that prepared them, as in gemm/engine.py. dtype: of the result; for a way to a weight
// gradient that of dW and, 8 bits higher, of dy.
inline Key product_key(ProductKind kind, int32_t device, int32_t dtype, int64_t tokens, int64_t out_features,
                       int64_t in_features, bool bias, std::string_view backend) {
  const int64_t head = static_cast<int64_t>(kind) | int64_t{bias} << 8 | int64_t{dtype} << 16 | int64_t{device} << 32;
  return {head, thread_number(), tokens, out_features, in_features, named(backend), 0, 1};
}

// first, second: whether an optional operand is there: codes and scale of a pack, seed and sums of a sample, both results
// of quantise, bias of rescale. stride: of rescale the bias's dtype. written_dtype: of sample_fp8 that of the gradient in
// e4m3, 0 where it is not written.
inline Key launch_key(LaunchKind kind, int32_t device, int32_t read_dtype, int32_t written_dtype,
                      std::string_view mask, int64_t rows, int64_t columns, int64_t stride, bool first, bool second) {
  const int64_t head = static_cast<int64_t>(kind) | int64_t{first} << 8 | int64_t{second} << 9 |
                       int64_t{read_dtype} << 16 | int64_t{written_dtype} << 24 | int64_t{device} << 32;
  return {head, named(mask), rows, columns, stride, 0, 0, 2};
}

}  // namespace semisparse
