// The launch layer of semisparse on CUDA.
#include "interface.h"

namespace semisparse {

struct Cuda {
  static constexpr const char* library = "semisparse";
  static constexpr const char* dispatch_key = "CUDA";
  static int32_t type() { return aoti_torch_device_type_cuda(); }
  static Prepared& prepared() {
    // Never destroyed: threads may still be inside a call when the process ends.
    static Prepared* const made = new Prepared;
    return *made;
  }
};

}  // namespace semisparse

SEMISPARSE_DEFINE_INTERFACE(semisparse::Cuda)
