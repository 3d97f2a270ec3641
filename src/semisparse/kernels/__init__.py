"""Triton kernels, each with a plain `launch` on tensors; no autograd, no modules, no torch.library."""
