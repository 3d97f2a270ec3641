"""The specification: masks, packing and linear layers in slow, plain PyTorch that runs on any device.

Kernels are judged by this package, bit for bit where arithmetic allows; it never imports one.
"""

from semisparse.reference import linear, masks, packing

__all__ = ["linear", "masks", "packing"]
