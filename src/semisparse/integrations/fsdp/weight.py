"""How the weight of one layer is gathered: what FSDP2 sends instead of the shard, and what it makes of what arrives.

FSDP2 asks the local tensor of a parameter for fsdp_pre_all_gather and fsdp_post_all_gather. They are set on the tensor
object itself, so that shards stay plain tensors: for the optimizer, in a state_dict and in a checkpoint.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from semisparse import ops, routes
from semisparse.errors import ConfigError
from semisparse.integrations.fsdp import wire
from semisparse.masks import get
from semisparse.nn.linear import SemiSparseLinear

Form = Literal["whole", "kept", "kept in e4m3"]
"""What travels: the weight, or the values that its mask keeps with the mask, in the dtype of the gather or in e4m3."""


class GatheredWeight:
    """The weight of a layer under FSDP2, and the two functions that FSDP2 calls around its all-gather.

    Args:
        name: Of the layer.
        layer: The layer.
        parameter: FSDP2's own record of its weight (an FSDPParam).

    Attributes:
        multiplier: What values are multiplied by before they are rounded to e4m3; the same on all ranks.
        scale: Its inverse.
    """

    def __init__(self, name: str, layer: nn.Module, parameter: Any) -> None:
        self.name, self.layer, self.parameter = name, layer, parameter
        self.multiplier: Tensor | None = None
        self.scale: Tensor | None = None
        self._sent: Form = "whole"

    @property
    def shard(self) -> Tensor:
        """This rank's rows of the master weight."""
        local: Tensor = self.parameter.sharded_param._local_tensor
        return local

    @property
    def dtype(self) -> torch.dtype:
        """That the weight is gathered in."""
        found: torch.dtype | None = self.parameter.mp_policy.param_dtype
        return found or self.shard.dtype

    @property
    def form(self) -> Form:
        """What the next gather sends; it follows the phase of the layer."""
        layer = self.layer
        sparse = isinstance(layer, SemiSparseLinear) and layer.sparse_enabled and layer.has_mask
        return self.form_when_sparse if sparse else "whole"

    @property
    def form_when_sparse(self) -> Form:
        """What a gather sends in a sparse phase."""
        assert isinstance(self.layer, SemiSparseLinear)
        config, weight = self.layer.sparse_config, self.parameter.sharded_param
        if config.precision is not None and routes.takes_fp8(weight, self.dtype, config.weight, config.backend):
            return "kept in e4m3"
        return "kept"

    @property
    def outdated(self) -> bool:
        """Whether the last gather sent something else than the next one would."""
        return self._sent != self.form

    def attach(self) -> None:
        """Set both functions on the shard; again where loading or moving a model has made another tensor of it."""
        shard: Any = self.shard
        if not hasattr(shard, "fsdp_pre_all_gather"):
            shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = self.before, self.after
            self.parameter._init_extensions()

    def before(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor, ...], Form]:
        """FSDP2's fsdp_pre_all_gather: what this rank sends, chosen from the master weight and then rounded."""
        form, shard = self.form, self.shard.detach()
        # FSDP2 allocates what receives once, as it is needed first: emptied, it is allocated again.
        received = self.parameter.all_gather_outputs
        if form != self._sent or (received and received[0].is_inference() and not torch.is_inference_mode_enabled()):
            self.parameter.all_gather_outputs = []
            self._sent = form
        if form == "whole":
            return (shard.to(self.dtype),), form
        layer = self.layer
        assert isinstance(layer, SemiSparseLinear)
        if layer.holds:
            raise ConfigError(
                f"{self.name}: the layer holds a mask or a scale, which is not gathered: use a recipe whose masks "
                "follow the weights (safest, fastest, dinov2), or leave the layer out by exclude="
            )
        codes = ops.tile_codes(shard, layer._mask)
        kept = wire.keep(shard, codes)
        if form == "kept":
            return (kept.to(self.dtype), codes), form
        if self.multiplier is None:
            raise ConfigError(
                f"{self.name} is gathered in e4m3, and no forward of the outermost FSDP2 module has found the scale of "
                "its weight: call the whole model first, or leave the layer out by exclude="
            )
        return (wire.to_e4m3(kept, self.multiplier), codes), form

    def after(
        self, outputs: tuple[Tensor, ...], form: Form, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """FSDP2's fsdp_post_all_gather: the weight of the forward, pruned where the kept values have travelled."""
        size = self.parameter.sharded_param.shape
        with torch.inference_mode(False):  # a first gather in inference mode must not keep the weight from training
            weight = torch.empty(size, dtype=dtype, device=outputs[0].device) if out is None else out
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):  # type: ignore[attr-defined]
            if form == "whole":
                weight.copy_(outputs[0])
            else:
                values, codes = outputs
                if form == "kept in e4m3":
                    assert self.scale is not None
                    values = wire.from_e4m3(values, self.scale, dtype)
                wire.spread(values, codes, weight)
        outputs[0].untyped_storage().resize_(0)  # FSDP2 allocates it again for the next gather
        if isinstance(self.layer, SemiSparseLinear):
            # Where a mask follows from sums, those of the rounded weight may choose another one.
            known = form != "whole" and get(self.layer._mask).from_codes
            self.layer.gathered_codes = outputs[1] if known else None
        return (weight, (weight,)) if out is None else None
