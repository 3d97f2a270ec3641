// The same ops for the CPU, under a name of their own, with foreign functions that a test hands over.
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
