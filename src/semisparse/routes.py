"""Which route a call takes, and why: in fp8, packed or masked dense, and how each is differentiated."""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from semisparse.config import BACKENDS, Backend
from semisparse.errors import ConfigError, EngineError
from semisparse.formats.layout import PACKED_DTYPES, SPARSE_MULTIPLE, SPARSE_MULTIPLE_8BIT
from semisparse.tracing import constant, transforming

Transform = Literal["", "grad", "other"]

FP8_CAPABILITY = (8, 9)
"""The lowest CUDA capability whose tensor cores multiply e4m3."""


def check_backend(backend: str) -> None:
    """Raise ConfigError unless there is such a backend."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is not one of {', '.join(map(repr, BACKENDS))}")


def packs(weight: Tensor, dtype: torch.dtype, backend: Backend) -> bool:
    """Whether a layer takes the packed route; a fact of device, dtype and sizes alone.

    Args:
        weight: (N, K).
        dtype: That the products are computed in.
        backend: As SparseConfig's.

    Raises:
        ConfigError: There is no such backend.
        EngineError: backend="cusparselt" asks for a route that is not there.
    """
    check_backend(backend)
    rows, columns = weight.shape
    possible = weight.is_cuda and dtype in PACKED_DTYPES and not (rows % SPARSE_MULTIPLE or columns % SPARSE_MULTIPLE)
    if backend == "cusparselt" and not possible:
        raise EngineError(
            f"backend='cusparselt' needs a CUDA weight in fp16 or bf16 with N and K multiples of {SPARSE_MULTIPLE}; "
            f"it is {tuple(weight.shape)} on {weight.device}, computed in {dtype}: use backend='auto' or torch.autocast"
        )
    return possible and backend != "dense"


def takes_fp8(weight: Tensor, dtype: torch.dtype, mask: str | None, backend: Backend) -> bool:
    """Whether a layer with precision="fp8" computes in it; a fact of device, dtype and sizes alone.

    On the CPU it does, in plain PyTorch: the same numbers, slowly.

    Args:
        weight: (N, K).
        dtype: Of the call.
        mask: What prunes the weight; None in a dense phase, or if nothing does.
        backend: As SparseConfig's.

    Raises:
        ConfigError: There is no such backend.
        EngineError: backend="cusparselt" asks for a sparse product that is not there.
    """
    check_backend(backend)
    if mask is not None and backend == "cusparselt" and not weight.is_cuda:
        packs(weight, dtype, backend)  # raises
    rows, columns = weight.shape
    return (
        dtype is not torch.float64
        and not (rows % SPARSE_MULTIPLE_8BIT or columns % SPARSE_MULTIPLE_8BIT)
        and (weight.device.type in ("cpu", "meta") or (weight.is_cuda and _has_fp8(weight.get_device())))
    )


def why_not_fp8(weight: Tensor, dtype: torch.dtype) -> str:
    """Why takes_fp8() says no, in words; empty where it says yes."""
    if dtype is torch.float64:
        return "computed in torch.float64, and fp8 needs float32, float16 or bfloat16"
    if weight.shape[0] % SPARSE_MULTIPLE_8BIT or weight.shape[1] % SPARSE_MULTIPLE_8BIT:
        return f"N x K = {' x '.join(map(str, weight.shape))}, and fp8 needs multiples of {SPARSE_MULTIPLE_8BIT}"
    if weight.device.type not in ("cpu", "meta", "cuda"):
        return f"the weight is on {weight.device}, and fp8 needs CUDA"
    if weight.is_cuda and not _has_fp8(weight.get_device()):
        found, needed = (".".join(map(str, pair)) for pair in (_capability(weight.get_device()), FP8_CAPABILITY))
        return f"the GPU has capability {found}, and fp8 needs {needed}"
    return ""


@constant
def _has_fp8(index: int) -> bool:
    """Whether a CUDA device multiplies fp8; the compiler cannot compare capabilities itself."""
    return _capability(index) >= FP8_CAPABILITY


_capability = cache(torch.cuda.get_device_capability)


def why_masked_dense(weight: Tensor, dtype: torch.dtype, backend: Backend) -> str:
    """Why packs() says no, in words; empty where it says yes."""
    return "backend='dense' asks for it" if backend == "dense" else _obstacle(weight, dtype)


def _obstacle(weight: Tensor, dtype: torch.dtype) -> str:
    """Why no sparse product can take this weight, whatever the backend; empty where one can."""
    if not weight.is_cuda:
        return f"the weight is on {weight.device}, and sparse products need CUDA"
    if dtype not in PACKED_DTYPES:
        return f"computed in {dtype}, and sparse products need fp16 or bf16: use torch.autocast"
    if weight.shape[0] % SPARSE_MULTIPLE or weight.shape[1] % SPARSE_MULTIPLE:
        return f"N x K = {' x '.join(map(str, weight.shape))}, and sparse products need multiples of {SPARSE_MULTIPLE}"
    return ""


def transform_at_work(backend: Backend) -> Transform:
    """Which torch.func transform this call is part of.

    Args:
        backend: As SparseConfig's.

    Returns:
        "" for none, "grad" for torch.func.grad alone, "other" where the packed ops have no rules: in vmap, forward mode
        and, in compiled code, any transform. (torch.compile ignores the backward of an autograd.Function inside
        torch.func transforms and differentiates its forward, so that the gradient would be zero.)

    Raises:
        EngineError: backend="cusparselt" asks for packed ops where they have no rules.
    """
    found: Transform
    if torch.compiler.is_compiling():
        found = "other" if transforming() else ""
    elif torch._C._functorch.maybe_current_level() is not None:
        kinds = torch._C._functorch.TransformType
        levels = torch._C._functorch.get_interpreter_stack() or ()
        found = "other" if any(level.key() in (kinds.Vmap, kinds.Jvp) for level in levels) else "grad"
    else:
        found = "other" if torch.autograd.forward_ad._current_level >= 0 else ""
    if found == "other" and backend == "cusparselt":
        raise EngineError(
            "backend='cusparselt' cannot run inside vmap or forward-mode derivatives, nor in compiled torch.func "
            "transforms: use backend='auto', which computes masked dense there"
        )
    return found
