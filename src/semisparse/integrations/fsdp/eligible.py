"""Which weights of a model FSDP2 can gather compressed, and the errors for those that it cannot."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from semisparse.arguments import check_module
from semisparse.errors import ConfigError, LayerRefusedError, NoLayerMatchedError, ShapeError
from semisparse.integrations.fsdp.weight import GatheredWeight
from semisparse.nn.linear import SemiSparseLinear
from semisparse.pattern import GROUP
from semisparse.surgery.layers import layers_with_masks
from semisparse.surgery.selection import FoundLayer, Selector, as_selectors, matches, nothing_matched

_MASKS = ("transposable", "row")  # of each group of 4 exactly two entries are kept
_EXCLUDE = "or gather it whole by exclude="

Found = list[tuple[GatheredWeight, FSDPModule]]
"""Weights to compress, each with the FSDP2 module that gathers it."""


def find(model: nn.Module, exclude: Selector | Iterable[Selector] | None) -> tuple[Found, dict[str, str]]:
    """The weights to compress, and the others with the reasons; compress_all_gather documents arguments and errors."""
    check_module(model)
    selectors = as_selectors(exclude, "exclude")
    parameters = _parameters(model)
    layers = layers_with_masks(model)
    candidates = [FoundLayer(name, layer, ()) for name, layer in layers.items()]
    for selector in selectors:
        if not any(matches(selector, candidate) for candidate in candidates):
            raise nothing_matched(selector, candidates, "exclude")
    found: Found = []
    whole: dict[str, str] = {}
    for candidate in candidates:
        name, layer = candidate.name, layers[candidate.name]
        if any(matches(selector, candidate) for selector in selectors):
            whole[name] = "it is excluded"
            continue
        if id(layer) not in parameters:
            raise LayerRefusedError(f"{name}: its weight is not sharded by FSDP2: call fully_shard on it, {_EXCLUDE}")
        parameter, owner = parameters[id(layer)]
        _check(name, layer, parameter)
        weight = GatheredWeight(name, layer, parameter)
        _check_dtype(weight)
        if parameter.shard_mesh.size() == 1:
            whole[name] = "one rank holds all of it, and nothing travels"
        else:
            found.append((weight, owner))
    if not found and not whole:
        raise NoLayerMatchedError("no layer of model has a pruned weight: call sparsify before compress_all_gather")
    return found, whole


def outermost(model: nn.Module) -> list[nn.Module]:
    """The FSDP2 modules of model that are in no other one."""
    every: list[nn.Module] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inner = {id(module) for outer in every for module in outer.modules() if module is not outer}
    return [module for module in every if id(module) not in inner]


def _parameters(model: nn.Module) -> dict[int, tuple[Any, FSDPModule]]:
    """FSDP2's records of weights and the modules that own them, by the id of the layer."""
    found: dict[int, tuple[Any, FSDPModule]] = {}
    owners: list[FSDPModule] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not owners:
        raise ConfigError("model has no FSDP2 module: call torch.distributed.fsdp.fully_shard before this")
    for owner in owners:
        state: Any = owner._get_fsdp_state()
        # Torch 2.13 has a list of them, earlier versions one or None.
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for parameter in [parameter for group in groups if group is not None for parameter in group.fsdp_params]:
            info = parameter._module_info
            if info.param_name == "weight":
                found[id(info.module)] = parameter, owner
    return found


def _check(name: str, layer: SemiSparseLinear, parameter: Any) -> None:
    """Raise the error for a weight that cannot be gathered compressed."""
    placements = parameter.sharded_param.placements
    rows, ranks = layer.out_features, parameter.shard_mesh.size()
    if parameter.is_dtensor:
        raise LayerRefusedError(f"{name}: its weight is sharded by tensor parallelism, too: change that, {_EXCLUDE}")
    if not (placements[-1].is_shard(0) and all(placement.is_replicate() for placement in placements[:-1])):
        raise LayerRefusedError(f"{name}: its weight is placed as {placements}: shard it along its rows, {_EXCLUDE}")
    if parameter._module_info.shared_modules:
        raise LayerRefusedError(f"{name}: another module has the same weight and would get it pruned: {_EXCLUDE[3:]}")
    if rows % (GROUP * ranks):
        raise ShapeError(
            f"{name}: out_features={rows} on {ranks} ranks does not give each a multiple of {GROUP} rows, as the tiles "
            f"of a mask need: shard over fewer ranks, {_EXCLUDE}"
        )
    after_forward = parameter.post_forward_mesh_info
    reasons = (
        (layer.sparse_config.weight not in _MASKS, f"mask={layer.sparse_config.weight!r} is not one of {_MASKS}"),
        (layer.holds, "the layer holds a mask or a scale of a recipe"),
        (parameter.offload_to_cpu, "FSDP2 offloads its weight (CPUOffloadPolicy)"),
        (
            after_forward is not None and after_forward is not parameter.mesh_info,
            "FSDP2 reshards it to fewer ranks after the forward (reshard_after_forward is a number, not a bool)",
        ),
        (hasattr(parameter.sharded_param._local_tensor, "fsdp_pre_all_gather"), "its gather is changed already"),
        (hasattr(parameter, "_unsharded_param"), "it was gathered before: call this before the first forward"),
    )
    for fails, reason in reasons:
        if fails:
            raise ConfigError(f"{name}: {reason}: change that, {_EXCLUDE}")


def _check_dtype(weight: GatheredWeight) -> None:
    if weight.form_when_sparse == "kept in e4m3" and weight.dtype is torch.float16:
        raise ConfigError(
            f"{weight.name}: precision='fp8' is not gathered in float16, which cannot hold all that e4m3 times a scale "
            f"can be: use MixedPrecisionPolicy(param_dtype=torch.bfloat16), {_EXCLUDE}"
        )
