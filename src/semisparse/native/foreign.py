"""The functions of CUDA's driver and of torch that the native library calls, from what this process has loaded."""

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

from semisparse.native.structures import Functions


def functions(matmul: int, set_attribute: int) -> Functions:
    """The table of foreign functions.

    Args:
        matmul: Address of cusparseLtMatmul in the library that made the plans; 0 where there is none, and no product
            may then be added.
        set_attribute: Address of cusparseLtMatmulDescSetAttribute.

    Raises:
        OSError: CUDA's driver or torch's CUDA library is not loaded in this process.
        AttributeError: One of their functions is not there.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    path = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    cuda = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    return Functions(
        matmul=matmul,
        set_attribute=set_attribute,
        launch_kernel=_address(driver.cuLaunchKernel),
        fill=_address(driver.cuMemsetD8Async),
        current_stream=_address(cuda.aoti_torch_get_current_cuda_stream),
        open_guard=_address(cuda.aoti_torch_create_cuda_guard),
        close_guard=_address(cuda.aoti_torch_delete_cuda_guard),
        mm=_address(cuda.aoti_torch_cuda_mm_out),
        addmm=_address(cuda.aoti_torch_cuda_addmm_out),
        scaled_mm=_address(cuda.aoti_torch_cuda__scaled_mm_out),
    )


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
