// The same ops for the CPU, under a name of their own, with foreign functions that a test hands over.
#include <cstddef>
#include <string_view>

#include "../interface.h"

namespace semisparse {

struct Cpu {
  static constexpr const char* library = "semisparse_test";
  static constexpr const char* dispatch_key = "CPU";
  static int32_t type() { return aoti_torch_device_type_cpu(); }
  static Prepared& prepared() {
    static Prepared* const made = new Prepared;
    return *made;
  }
};

}  // namespace semisparse

SEMISPARSE_DEFINE_INTERFACE(semisparse::Cpu)

SEMISPARSE_EXPORT int64_t semisparse_forget_launches() {
  return semisparse::Cpu::prepared().launches.erase([](const semisparse::Launch&) { return true; });
}

// Offset of a field as the compiler lays its structure out, or the structure's size for the field "sizeof"; else -1.
SEMISPARSE_EXPORT int64_t semisparse_offset(const char* structure, const char* field) {
  const std::string_view kind(structure), name(field);
#define SEMISPARSE_SIZE(Structure) \
  if (kind == #Structure && name == "sizeof") return sizeof(semisparse::Structure)
#define SEMISPARSE_FIELD(Structure, member) \
  if (kind == #Structure && name == #member) return offsetof(semisparse::Structure, member)
  SEMISPARSE_SIZE(Functions);
  SEMISPARSE_FIELD(Functions, matmul);
  SEMISPARSE_FIELD(Functions, set_attribute);
  SEMISPARSE_FIELD(Functions, launch_kernel);
  SEMISPARSE_FIELD(Functions, fill);
  SEMISPARSE_FIELD(Functions, current_stream);
  SEMISPARSE_FIELD(Functions, open_guard);
  SEMISPARSE_FIELD(Functions, close_guard);
  SEMISPARSE_FIELD(Functions, mm);
  SEMISPARSE_FIELD(Functions, addmm);
  SEMISPARSE_FIELD(Functions, scaled_mm);
  SEMISPARSE_SIZE(ProductFacts);
  SEMISPARSE_FIELD(ProductFacts, handle);
  SEMISPARSE_FIELD(ProductFacts, plan);
  SEMISPARSE_FIELD(ProductFacts, descriptor);
  SEMISPARSE_FIELD(ProductFacts, bias);
  SEMISPARSE_FIELD(ProductFacts, uses);
  SEMISPARSE_FIELD(ProductFacts, last_use);
  SEMISPARSE_FIELD(ProductFacts, packed_bytes);
  SEMISPARSE_FIELD(ProductFacts, workspace);
  SEMISPARSE_FIELD(ProductFacts, a_rows);
  SEMISPARSE_FIELD(ProductFacts, a_columns);
  SEMISPARSE_FIELD(ProductFacts, b_rows);
  SEMISPARSE_FIELD(ProductFacts, b_columns);
  SEMISPARSE_FIELD(ProductFacts, d_rows);
  SEMISPARSE_FIELD(ProductFacts, d_columns);
  SEMISPARSE_FIELD(ProductFacts, b_transposed);
  SEMISPARSE_FIELD(ProductFacts, d_transposed);
  SEMISPARSE_FIELD(ProductFacts, bias_follows);
  SEMISPARSE_SIZE(LaunchFacts);
  SEMISPARSE_FIELD(LaunchFacts, function);
  SEMISPARSE_FIELD(LaunchFacts, grid);
  SEMISPARSE_FIELD(LaunchFacts, threads);
  SEMISPARSE_FIELD(LaunchFacts, shared_bytes);
  SEMISPARSE_FIELD(LaunchFacts, parameter_count);
  SEMISPARSE_FIELD(LaunchFacts, bytes);
  SEMISPARSE_FIELD(LaunchFacts, behind);
  SEMISPARSE_FIELD(LaunchFacts, source);
  SEMISPARSE_FIELD(LaunchFacts, value);
  return -1;
}
