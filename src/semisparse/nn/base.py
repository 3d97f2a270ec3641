"""What both semi-sparse layers share: turning an nn.Linear into one and back, in place."""

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from semisparse.config import Operand, SparseConfig
from semisparse.errors import ConfigError, LayerRefused, ShapeError
from semisparse.pattern import GROUP

_PLAIN_LINEARS: set[type[nn.Linear]] = {nn.Linear}


def register_linear(cls: type[nn.Linear]) -> type[nn.Linear]:
    """Allow layers whose type is exactly cls to be swapped; usable as a class decorator.

    By registering you state that cls.forward computes F.linear(x, self.weight, self.bias) and nothing else, because a
    swapped layer replaces it. Swapping back restores cls. Raises ConfigError when cls is no subclass of nn.Linear.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Linear)) or issubclass(cls, SemiSparseBase):
        raise ConfigError(f"cls={cls!r} must be a dense subclass of torch.nn.Linear")
    _PLAIN_LINEARS.add(cls)
    return cls


def refusal(layer: nn.Linear) -> str | None:
    """Why this layer cannot be made semi-sparse, or None when it can. Looks at the layer alone, not its parent."""
    if parametrize.is_parametrized(layer):
        return "it is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    if "weight" not in layer._parameters:
        return "its weight is computed by a hook (weight_norm, spectral_norm or pruning): remove that first"
    if type(layer) not in _PLAIN_LINEARS:
        return (
            f"its type {type(layer).__name__} is a subclass of nn.Linear: if its forward is plain F.linear, "
            "call semisparse.register_linear on it; swap before wrapping with FSDP"
        )
    if layer.in_features % GROUP or layer.out_features % GROUP:
        return (
            f"in_features={layer.in_features} and out_features={layer.out_features} must both be multiples of {GROUP}"
        )
    return None


class SemiSparseBase(nn.Linear):
    """nn.Linear that knows a SparseConfig and can be dense or sparse; subclasses add the sparse forward.

    Parameters, their names and shapes are nn.Linear's, there are no buffers, and state_dict keys are the same.
    config: the layer's SparseConfig (read-only by convention).
    sparse_enabled: False while a schedule is in a dense phase; the layer is then exactly nn.Linear. train() and eval()
    never change it.
    Raises ShapeError when in_features or out_features is no multiple of 4, ConfigError for another operand's config.
    """

    operand: ClassVar[Operand]
    # Class attributes are the defaults, so that a swapped layer needs no __init__ and old pickles keep loading.
    config: SparseConfig
    sparse_enabled: bool = True
    _dense_class: type[nn.Linear] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: SparseConfig | None = None,
    ) -> None:
        if in_features % GROUP or out_features % GROUP:
            raise ShapeError(
                f"in_features={in_features} and out_features={out_features} must both be multiples of {GROUP}; "
                "use nn.Linear for this layer"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_config(config)

    @classmethod
    def from_dense(cls, linear: nn.Linear, config: SparseConfig | None = None) -> Self:
        """Turn linear into a semi-sparse layer in place and return it: same object, same Parameters, same hooks.

        Works on any device (meta too) and dtype; reads no data. Raises LayerRefused with the reason when the layer
        cannot be 2:4, ConfigError when config is for the other operand.
        """
        if not isinstance(linear, nn.Linear):
            raise LayerRefused(f"linear is a {type(linear).__name__}; from_dense takes an nn.Linear")
        reason = refusal(linear)
        if reason is not None:
            raise LayerRefused(f"linear={linear} stays dense: {reason}")
        cls._checked(config)
        dense_class = type(linear)
        linear.__class__ = cls  # keeps outside references, hooks and optimizer state valid
        layer: Self = linear  # type: ignore[assignment]
        if dense_class is not nn.Linear:
            layer._dense_class = dense_class
        layer._set_config(config)
        return layer

    @classmethod
    def to_dense(cls, layer: "SemiSparseBase") -> nn.Linear:
        """Turn a semi-sparse layer back into the dense class it came from, in place, and return it.

        The weight is the dense master weight, unchanged; semisparse.densify can write the pruned weight instead.
        Raises LayerRefused when layer is not a semi-sparse layer or has been wrapped (by FSDP, say) since.
        """
        if not isinstance(layer, SemiSparseBase):
            raise LayerRefused(f"layer is a {type(layer).__name__}; to_dense takes a semi-sparse layer")
        if "operand" not in vars(type(layer)):  # only the two layer classes themselves define it
            raise LayerRefused(
                f"layer has type {type(layer).__name__}, which wraps a semi-sparse layer: unwrap it first, or end "
                "with a dense phase of a SparseSchedule, which needs no swap"
            )
        dense_class = layer._dense_class
        for name in ("config", "sparse_enabled", "_dense_class", "_frozen"):
            layer.__dict__.pop(name, None)
        layer.__class__ = dense_class  # type: ignore[assignment]
        return layer

    def pruned_weight(self) -> Tensor:
        """The weight (N x K, detached, its own dtype) as the sparse forward uses it."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """nn.Linear's fields, then the mask and whether it is applied."""
        state = "on" if self.sparse_enabled else "off (dense phase)"
        config = self.config
        settings = f"operand={config.operand}, mask={config.mask}, engine={config.engine}"
        return f"{super().extra_repr()}, {settings}, sparse={state}"

    @classmethod
    def _checked(cls, config: SparseConfig | None) -> SparseConfig | None:
        if config is not None and config.operand != cls.operand:
            raise ConfigError(
                f"config.operand={config.operand!r} does not fit {cls.__name__}; use operand={cls.operand!r}"
            )
        return config

    def _set_config(self, config: SparseConfig | None) -> None:
        if self._checked(config) is not None:
            self.config = config  # type: ignore[assignment]
