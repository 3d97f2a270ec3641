// What Python prepares and C++ starts: products of cuSPARSELt, and launches of compiled Triton kernels.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "functions.h"
#include "table.h"

namespace semisparse {

// Device addresses handed to cuSPARSELt must be multiples of this, and kernels are compiled for such addresses.
constexpr uintptr_t kAlignment = 16;

// formats/layout.py's PADDING.
constexpr unsigned char kPadding = 0xEE;

// As native/structures.py lays it out: a product D = A B (+ bias), and what a call must match. Without a plan it is
// masked dense, and what belongs to a plan is zero.
struct ProductFacts {
  const void* handle;
  const void* plan;
  void* descriptor;
  void** bias;        // the host word that the library reads the bias address from; null without bias
  int64_t* uses;      // of the handle, so far: Python's count, which it frees plans by
  int64_t* last_use;  // of the plan: that count at its last use
  int64_t packed_bytes;
  int64_t workspace;  // bytes
  int64_t a_rows, a_columns;                      // of the pruned operand
  int64_t b_rows, b_columns, d_rows, d_columns;   // of the tensors that hold B and D, or their transposes
  int32_t b_transposed, d_transposed;
  int32_t bias_follows;  // whether a finished plan follows a new bias address
};

class Product {
 public:
  explicit Product(const ProductFacts& facts) : facts(facts) {}

  const ProductFacts facts;

  // Starts the product. Returns false where the plan is gone or the library refuses: the caller then asks Python.
  bool start(const Functions& functions, const void* a, const void* b, void* d, void* bias, void* workspace,
             void* stream) {
    // A plan belongs to one thread, so this lock is only ever contended by drop().
    std::lock_guard lock(busy_);
    if (!alive_) return false;
    if (facts.bias != nullptr && *facts.bias != bias) {
      if (!facts.bias_follows) return false;
      void* before = *facts.bias;
      *facts.bias = bias;
      if (functions.set_attribute(facts.handle, facts.descriptor, kBiasPointer, facts.bias, sizeof(void*)) != 0) {
        *facts.bias = before;
        return false;
      }
    }
    *facts.last_use = ++*facts.uses;  // this thread's words, as the plan is
    static constexpr float kOne = 1.0f, kZero = 0.0f;
    return functions.matmul(facts.handle, facts.plan, &kOne, a, b, &kZero, d, d, workspace, &stream, 1) == 0;
  }

  // Returns after the last start() that used the plan; none uses it any more. The owner may then free the plan.
  void drop() {
    std::lock_guard lock(busy_);
    alive_ = false;
  }

 private:
  static constexpr int kBiasPointer = 8;  // CUSPARSELT_MATMUL_BIAS_POINTER
  std::mutex busy_;
  bool alive_ = true;
};

// As native/structures.py lays it out: a compiled kernel with grid and sizes. Only addresses change between calls.
struct LaunchFacts {
  static constexpr int kMost = 32;
  void* function;
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared_bytes;
  int32_t parameter_count;
  int64_t bytes[2];       // of the buffers that the launch writes
  int64_t behind[2];      // of these, at the end, which the kernel does not write and which are padded
  int32_t source[kMost];  // per parameter: which address of the call it is, or -1 for value
  int64_t value[kMost];
};

class Launch {
 public:
  explicit Launch(const LaunchFacts& facts) : facts(facts) {}

  const LaunchFacts facts;

  // Nothing to do: kernels live as long as the process.
  void drop() {}

  // Starts the kernel. Returns false where the driver refuses: the caller then asks Python.
  template <size_t count>
  bool start(const Functions& functions, std::array<void*, count> addresses, void* stream) const {
    int64_t words[LaunchFacts::kMost];
    void* parameters[LaunchFacts::kMost];
    for (int n = 0; n < facts.parameter_count; ++n) {
      const int32_t source = facts.source[n];
      words[n] = source < 0 ? facts.value[n] : reinterpret_cast<int64_t>(addresses[source]);
      parameters[n] = &words[n];
    }
    return functions.launch_kernel(facts.function, facts.grid[0], facts.grid[1], facts.grid[2], facts.threads, 1, 1,
                                   facts.shared_bytes, stream, parameters, nullptr) == 0;
  }
};

// Everything that was prepared for one kind of device.
struct Prepared {
  // The first functions stay: another thread may be inside of one.
  void connect(const Functions& given) {
    std::lock_guard lock(connecting);
    if (connected.load(std::memory_order_relaxed)) return;
    functions = given;
    connected.store(true, std::memory_order_release);
  }

  std::mutex connecting;
  std::atomic<bool> connected{false};
  Functions functions{};
  Table<Product> products;
  Table<Launch> launches;
  // Products started or recorded in a CUDA graph: sparse ones, and masked-dense ones.
  std::atomic<int64_t> started{0}, started_dense{0};
  std::atomic<int64_t> watchers{0};  // while above 0, Python sees every call
};

// Numbers the calling thread. Unlike system thread ids these are never used again.
inline int64_t thread_number() {
  static std::atomic<int64_t> next{1};
  thread_local const int64_t number = next++;
  return number;
}

}  // namespace semisparse
