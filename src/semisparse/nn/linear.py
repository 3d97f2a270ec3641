"""The layer with a 2:4 weight, or with a dense one in fp8."""

from typing import ClassVar, cast

from torch import Tensor

from semisparse import functional, ops
from semisparse.config import Operand, SparseConfig
from semisparse.errors import ConfigError, LayerRefusedError, TensorError
from semisparse.masks import MaskName
from semisparse.nn.base import SemiSparseBase
from semisparse.nn.packed_weight import PackedWeight, held_changed, usable
from semisparse.nn.tensor_parallel import UNSHARD, is_sharded, sharded_linear
from semisparse.reference.masks import from_codes


class SemiSparseLinear(SemiSparseBase):
    """nn.Linear whose weight is pruned to 2:4 by magnitude at every forward; the stored weight stays dense.

    input: (..., K), any leading sizes, zero tokens included, or a jagged nested tensor of such rows. Dtypes: fp64,
    fp32, fp16 and bf16, and any of them under autocast; the mask is then chosen from the stored weight.

    The gradient of the input passes through the pruned weight; the gradient of the weight passes straight through to
    the dense weight. Every forward sees the current weight. Straight-through 2:4 training: arXiv 2102.04010; masks:
    arXiv 2102.08124.

    With precision="fp8" the products are computed in fp8, in dense phases too; with weight=None the weight is never
    pruned. Where fp8 cannot run, repr and reports say why.

    Args and Raises are those of SemiSparseBase.

    Attributes:
        held_codes: Tile codes of the mask that a recipe holds; None if the mask follows the weight.
        held_scale: Scale of mask "soft", or None.
        held_seed: Key of the random numbers of grad_output="mvue", one int64 number on the weight's device, which a
            schedule sets and advances. None for the key 0, as without a schedule and on replicas of DataParallel: then
            samples follow from the gradient's values alone.
        gathered_codes: Tile codes of the mask that the weight has been pruned with already, where FSDP2 gathers pruned
            weights (semisparse.integrations.fsdp); otherwise None.
    """

    operand: ClassVar[Operand] = "weight"
    sparse_config: SparseConfig = SparseConfig()
    # Set by owners of packed weights: what to use instead of packing again.
    _packed: PackedWeight | None = None
    held_codes: Tensor | None = None
    held_scale: Tensor | None = None
    held_seed: Tensor | None = None
    gathered_codes: Tensor | None = None

    @property
    def _mask(self) -> MaskName:
        """The mask that sparse_config names; only for layers that have one.

        It never raises: tools read all properties of a module (torch.jit.trace does).
        """
        return cast(MaskName, self.sparse_config.weight)

    @property
    def _codes(self) -> Tensor | None:
        """The tile codes that a forward uses instead of choosing a mask."""
        return self.held_codes if self.gathered_codes is None else self.gathered_codes

    @property
    def has_mask(self) -> bool:
        """Whether the weight is pruned; False for a dense layer in fp8."""
        return self.sparse_config.weight is not None

    @property
    def holds(self) -> bool:
        """Whether codes or a scale are held."""
        return self.held_codes is not None or self.held_scale is not None

    def hold(self, *, codes: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Use these tile codes or this scale from now on; without arguments, none any longer.

        For recipes, which own both tensors and may write to them in place between steps.

        Args:
            codes: int16, N/4 x K/4, for mask "transposable".
            scale: An fp32 tensor without dimensions, which mask "soft" needs.

        Raises:
            TensorError: codes or scale is not a tensor.
        """
        for name, held in (("codes", codes), ("scale", scale)):
            if held is not None and not isinstance(held, Tensor):
                raise TensorError(f"{name}={held!r} is not a tensor; pass one on the weight's device, or None")
        self.held_codes, self.held_scale = codes, scale
        if self._packed is not None:
            held_changed(self)

    def _sparse_forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if is_sharded(weight):
            return sharded_linear(self._product, input, weight, self.bias)
        return self._product(input, weight, self.bias)

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        config = self.sparse_config
        return functional.semi_sparse_linear(
            input,
            weight,
            bias,
            mask=config.weight,
            codes=self._codes,
            scale=self.held_scale,
            grad_output=config.grad_output,
            seed=self.held_seed,
            precision=config.precision,
            repack=config.repack,
            backend=config.backend,
            packed=None if self._packed is None else usable(self, weight, input),
        )

    def pruned_weight(self) -> Tensor:
        """The weight as the sparse forward uses it: N x K, detached, in the parameter's dtype.

        With precision="fp8" the sparse forward rounds these values.

        Raises:
            ConfigError: The mask is "soft" and no recipe has set a scale.
            LayerRefusedError: The weight is sharded.
        """
        weight = self._whole_weight()
        if self.sparse_config.weight is None:
            return weight
        return ops.prune(weight, weight.dtype, self._mask, self._codes, self.held_scale)

    def chosen_mask(self) -> Tensor:
        """The mask (N x K, bool) that follows from the current weight, even if a recipe holds another one.

        Raises:
            ConfigError: The weight is not pruned.
            LayerRefusedError: The weight is sharded.
        """
        if not self.has_mask:
            raise ConfigError("the weight of this layer is not pruned (SparseConfig(weight=None)): it has no mask")
        return from_codes(ops.tile_codes(self._whole_weight(), self._mask))

    def _whole_weight(self) -> Tensor:
        weight = self.weight.detach()
        if is_sharded(weight):
            raise LayerRefusedError(f"the weight {tuple(weight.shape)} is a sharded DTensor: {UNSHARD}")
        return weight
