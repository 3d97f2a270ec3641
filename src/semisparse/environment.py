"""Versions, hardware, and the path that each capability will take on this machine. Collecting them never raises."""

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from semisparse import native
from semisparse.formats.layout import SPARSE_MULTIPLE
from semisparse.formats.packed import Packer, packed_format
from semisparse.gemm.chunks import CHUNK
from semisparse.gemm.engine import available, engine
from semisparse.versions import __version__, driver_version, package_version

_NOT_FOUND = "not found"
_WHERE_PACKED = f"packed in fp16 and bf16 with N and K multiples of {SPARSE_MULTIPLE}, otherwise masked dense"
_PACKERS: dict[Packer, tuple[str, str]] = {
    "kernel": ("Triton kernel", "Triton kernel, one pass for both directions"),
    "compressor": ("reference", "NVIDIA's compressor, once per direction"),
    "reference": ("reference", "reference, once per direction"),
}
"""Packer -> what prunes on the packed route, and how packing is done."""
_CUSPARSELT_PACKAGES = ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability of the library on one device.

    Attributes:
        name: The capability.
        path: What will run it.
        reason: Why that path.
    """

    name: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Environment:
    """What environment() found.

    Attributes:
        device: "cuda" or "cpu".
        facts: Name -> version or description; "not found" if there is none.
        capabilities: Of the library on device.
    """

    device: str
    facts: dict[str, str]
    capabilities: tuple[Capability, ...]


def environment() -> Environment:
    """Facts of this process and machine, for `semisparse env`, result files and benchmarks. Never raises."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {
        "semisparse": __version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "GPU": _guarded(_gpu),
        "driver": _guarded(driver_version),
        "CUDA of torch": torch.version.cuda or "none (CPU build)",
        "triton": _package("triton"),
        "cuSPARSELt": _guarded(_cusparselt),
        "nvmath-python": _package("nvmath-python"),
        "native library": native.status().reason,
    }
    return Environment(device, facts, capabilities(device))


def capabilities(device: str) -> tuple[Capability, ...]:
    """Which path weight mask, activation mask, packing, sparse GEMM and the launches of ops take, and why.

    Never raises: if a probe fails, the paths are "unknown" and the reason is its error. On CUDA it loads cuSPARSELt and
    probes its packed format, once per process.

    Args:
        device: Such as "cpu" or "cuda:1".
    """
    if torch.device(device).type != "cuda":
        reason = "CPU"
        return (
            Capability("weight mask", "reference", reason),
            Capability("activation mask", "reference", reason),
            Capability("packing", "not used: masked dense needs none", reason),
            Capability("sparse GEMM", "masked dense (reference)", reason),
            Capability("launches", "not used: nothing is launched", reason),
        )
    found = native.status()
    launches = Capability("launches", "native (C++)" if found.loaded else "Python", found.reason)
    return (*_packing(device), Capability("sparse GEMM", *_product(device)), launches)


def _packing(device: str) -> tuple[Capability, ...]:
    """Capabilities of masks and packing for the packed format of device, or the error of finding it."""
    try:
        index = torch.device(device).index
        found = packed_format(torch.cuda.current_device() if index is None else index, torch.bfloat16, engine())
        pruner, packer = _PACKERS[found.packer]
        where, why = _WHERE_PACKED, found.reason
    except Exception as error:  # packing at run time will fail in the same way
        pruner = packer = "unknown"
        where = why = f"{type(error).__name__}: {error}"
    return (
        Capability("weight mask", pruner, where),
        Capability("activation mask", pruner, where),
        Capability("packing", packer, why),
    )


def _product(device: str) -> tuple[str, str]:
    verdict = available(device)
    if not verdict.ok:
        return "masked dense", verdict.reason
    why = f"the fastest way, measured per problem at its first use; beyond {CHUNK} tokens also in chunks of them"
    return f"{verdict.reason} or masked dense", why


def _guarded(fact: Callable[[], str | None]) -> str:
    """The fact, or why it is unknown: a driver or library can raise anything."""
    try:
        return fact() or _NOT_FOUND
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _gpu() -> str:
    names = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (capability {major}.{minor})")
    return ", ".join(names)


def _package(name: str) -> str:
    return package_version(name) or _NOT_FOUND


def _cusparselt() -> str:
    found = [version for name in _CUSPARSELT_PACKAGES if (version := _package(name)) != _NOT_FOUND]
    built_in = torch.backends.cusparselt.version() if torch.cuda.is_available() else None
    if built_in is not None:
        found.append(f"{built_in} in torch")
    return ", ".join(found)
