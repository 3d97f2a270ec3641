// Which functions implement which ops.
#pragma once

#include "fp8.h"
#include "fp8_sampling.h"
#include "ops.h"
#include "sampling.h"

namespace semisparse {

// Makes these functions the implementations of the ops of Device::library under its dispatch key.
template <class Device>
void register_ops() {
  using torch::stable::detail::StableLibrary;
  // Never destroyed, as Device::prepared().
  static StableLibrary& library =
      *new StableLibrary(StableLibrary::Kind::IMPL, Device::library, Device::dispatch_key, __FILE__, __LINE__);
  library.impl("pack", TORCH_BOX(&pack<Device>));
  library.impl("pack_transpose", TORCH_BOX(&pack_transpose<Device>));
  library.impl("pack_tokens", TORCH_BOX(&pack_tokens<Device>));
  library.impl("unpack", TORCH_BOX(&unpack<Device>));
  library.impl("packed_matmul", TORCH_BOX(&packed_matmul<Device>));
  library.impl("pack_linear", TORCH_BOX(&pack_linear<Device>));
  library.impl("packed_tokens_matmul", TORCH_BOX(&packed_tokens_matmul<Device>));
  library.impl("packed_tokens_grad_weight", TORCH_BOX(&packed_tokens_grad_weight<Device>));
  library.impl("sampled_grad_weight", TORCH_BOX(&sampled_grad_weight<Device>));
  library.impl("quantise", TORCH_BOX(&quantise<Device>));
  library.impl("pack_fp8", TORCH_BOX(&pack_fp8<Device>));
  library.impl("unpack_fp8", TORCH_BOX(&unpack_fp8<Device>));
  library.impl("fp8_product", TORCH_BOX(&fp8_product<Device>));
  library.impl("fp8_dense_product", TORCH_BOX(&fp8_dense_product<Device>));
  library.impl("sample_fp8", TORCH_BOX(&sample_fp8<Device>));
  library.impl("fp8_sampled_product", TORCH_BOX(&fp8_sampled_product<Device>));
  library.impl("fp8_sampled_grad_weight", TORCH_BOX(&fp8_sampled_grad_weight<Device>));
  library.impl("rescale", TORCH_BOX(&rescale<Device>));
  library.impl("rescale_", TORCH_BOX(&rescale_in_place<Device>));
}

}  // namespace semisparse
