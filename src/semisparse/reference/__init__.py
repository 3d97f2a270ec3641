"""The specification: masks, packing and linear layers in slow, plain PyTorch that runs on any device.

Kernels are compared with it, bit for bit where arithmetic allows. It imports none of them.
"""

from semisparse.reference import linear, masks, packing

__all__ = ["linear", "masks", "packing"]
