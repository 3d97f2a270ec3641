// Every foreign function that the launch layer calls, as one table of pointers that Python hands over.
//
// Nothing here is linked: cuSPARSELt and the driver are the ones that Python planned and compiled with, and a test can
// hand over functions of its own. Each returns 0 for success.
#pragma once

#include <cstddef>
#include <cstdint>

namespace semisparse {

struct Functions {
  // cusparseLtMatmul and cusparseLtMatmulDescSetAttribute
  int (*matmul)(const void* handle, const void* plan, const void* alpha, const void* a, const void* b,
                const void* beta, const void* c, void* d, void* workspace, void** streams, int32_t stream_count);
  int (*set_attribute)(const void* handle, void* descriptor, int attribute, const void* value, size_t bytes);
  // cuLaunchKernel
  int (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                       void** extra);
  // cuMemsetD8Async
  int (*fill)(uint64_t address, unsigned char value, size_t bytes, void* stream);
  // aoti_torch_get_current_cuda_stream, aoti_torch_create_cuda_guard, aoti_torch_delete_cuda_guard
  int (*current_stream)(int32_t device, void** stream);
  int (*open_guard)(int32_t device, void** guard);
  int (*close_guard)(void* guard);
  // aoti_torch_cuda_mm_out, aoti_torch_cuda_addmm_out: tensors by their handles. Neither autograd nor autocast looks.
  int (*mm)(void* out, void* left, void* right);
  int (*addmm)(void* out, void* added, void* left, void* right, double of_added, double of_product);
  // aoti_torch_cuda__scaled_mm_out, or null: the same for e4m3. bias and scale_result are null.
  int (*scaled_mm)(void* out, void* left, void* right, void* scale_a, void* scale_b, void** bias, void** scale_result,
                   int32_t* out_dtype, int32_t fast_accumulation);
};

}  // namespace semisparse
