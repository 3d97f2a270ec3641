"""What both semi-sparse layers share: turning an nn.Linear into one and back, in place."""

from typing import Any, ClassVar, NoReturn, Self, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from semisparse.config import Operand, SparseConfig
from semisparse.errors import ConfigError, ExportError, LayerRefusedError, ShapeError
from semisparse.flops import register_flop_formulas
from semisparse.nn.copies import Origin
from semisparse.nn.refusals import refusal
from semisparse.nn.registry import rebuild, swapped_class
from semisparse.pattern import GROUP
from semisparse.tracing import exporting

# What a layer holds for the moment, and a copy of it must not.
_TRANSIENT = ("_packed", "_called", "_stands_for")
_ORIGIN = "_copied_from"
HELD = ("held_codes", "held_scale")
"""What a recipe sets on a layer that prunes its weight."""


class SemiSparseBase(nn.Linear):
    """nn.Linear that knows a SparseConfig and can be dense or sparse; subclasses add the sparse forward.

    Parameters, their names and shapes are nn.Linear's, there are no buffers, and state_dict keys are the same.
    sparse_config: the layer's SparseConfig (read-only by convention).
    sparse_enabled: False while a schedule is in a dense phase; the layer is then exactly nn.Linear. train() and eval()
    never change it.
    A subclass of your own must set operand again in its body; without that, to_dense takes it for a wrapper.
    Raises ShapeError when in_features or out_features is no multiple of 4, ConfigError for another operand's config.
    """

    operand: ClassVar[Operand]
    # Class attributes are the defaults, so that a swapped layer needs no __init__ and old pickles keep loading.
    sparse_config: SparseConfig
    sparse_enabled: bool = True
    _dense_class: ClassVar[type[nn.Linear]] = nn.Linear
    # Whether an eager forward ran since the swap. Written there, never read there.
    _called: bool = False
    # Set on a replica of DataParallel: the layer that it was made of.
    _stands_for: "SemiSparseBase | None" = None

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
        self._announce()

    def forward(self, input: Tensor) -> Tensor:
        """The linear layer with one operand pruned; plain F.linear while sparse_enabled is False.

        torch.export records ops with gradient formulas, torch.fx one call of the layer. Raises ShapeError, TensorError;
        ExportError in an ONNX export.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            if isinstance(input, Proxy):
                return self._traced(input)
            (self._stands_for or self).__dict__["_called"] = True
        if not self.sparse_enabled:
            return F.linear(input, self.weight, self.bias)
        if exporting() if compiling else torch._C._get_tracing_state() is not None:
            self._check_onnx()
        return self._sparse_forward(input)

    def _sparse_forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def from_dense(cls, linear: nn.Linear, config: SparseConfig | None = None) -> Self:
        """Turn linear into a semi-sparse layer in place and return it: same object, same Parameters, same hooks.

        Works on any device (meta too) and dtype; reads no data. A layer of a registered subclass stays an instance of
        it. Raises LayerRefusedError with the reason when the layer cannot be 2:4, ConfigError when config is for the
        other operand.
        """
        if not isinstance(linear, nn.Linear):
            raise LayerRefusedError(f"linear is a {type(linear).__name__}; from_dense takes an nn.Linear")
        reason = refusal(linear)
        if reason is not None:
            raise LayerRefusedError(f"linear={linear} stays dense: {reason}")
        cls._checked(config)
        swapped = swapped_class(cls, type(linear))
        cls._announce()
        linear.__class__ = swapped  # keeps outside references, hooks and optimizer state valid
        layer: Self = linear  # type: ignore[assignment]
        layer._set_config(config)
        return layer

    @classmethod
    def to_dense(cls, layer: "SemiSparseBase") -> nn.Linear:
        """Turn a semi-sparse layer back into the dense class it came from, in place, and return it.

        The weight is the dense master weight, unchanged; semisparse.densify can write the pruned weight instead.
        Raises LayerRefusedError when layer is not a semi-sparse layer, has been wrapped (by FSDP, say) since, or has a
        forward of its own that still calls the sparse one.
        """
        if not isinstance(layer, SemiSparseBase):
            raise LayerRefusedError(f"layer is a {type(layer).__name__}; to_dense takes a semi-sparse layer")
        reason = layer.bound_sparse()
        if reason is not None:
            raise LayerRefusedError(f"layer has type {type(layer).__name__}: {reason}")
        dense_class = layer._dense_class
        for name in ("sparse_config", "sparse_enabled", *HELD, *_TRANSIENT):
            layer.__dict__.pop(name, None)
        layer.__class__ = dense_class  # type: ignore[assignment]
        return layer

    def bound_sparse(self) -> str | None:
        """Why this layer cannot be made dense in place now, or None when it can."""
        if "operand" not in vars(type(self)):  # the layer classes themselves define it, wrappers' subclasses do not
            return (
                "it is a wrapper around a semi-sparse layer: unwrap it first, or end with a dense phase of a "
                "SparseSchedule, which needs no swap"
            )
        if "forward" in vars(self):
            return (
                "its forward was replaced on the instance (as accelerate's hooks do) and would go on calling the "
                "sparse one: remove those hooks first"
            )
        return None

    def pruned_weight(self) -> Tensor:
        """The weight (N x K, detached, its own dtype) as the sparse forward uses it."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The dense class's fields, then the mask and whether it is applied."""
        state = "on" if self.sparse_enabled else "off (dense phase)"
        return f"{super().extra_repr()}, {self.sparse_config}, sparse={state}"

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in _TRANSIENT}
        return {**state, _ORIGIN: Origin(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        origin = state.get(_ORIGIN)
        super().__setstate__({name: value for name, value in state.items() if name != _ORIGIN})
        if isinstance(origin, Origin):
            origin.note(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        base = vars(type(self)).get("_swapped_base")
        if base is None:
            return super().__reduce_ex__(protocol)
        return rebuild, (base, self._dense_class), self.__getstate__()

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()
        for name in _TRANSIENT:
            replica.__dict__.pop(name, None)
        replica.__dict__["_stands_for"] = self._stands_for or self  # not as a submodule
        return replica

    def __prepare_scriptable__(self) -> NoReturn:
        raise ExportError(
            f"torch.jit.script cannot compile the semi-sparse layer {self}: call semisparse.densify(model) first "
            "(weights='masked' keeps what the sparse layers compute)"
        )

    def _traced(self, input: Proxy) -> Any:
        """One call_module node, as torch.fx records for torch's own layers."""
        path_of = getattr(input.tracer, "path_of_module", None)
        path = "" if path_of is None else path_of(self)
        if not path:
            raise ExportError(
                f"this tracer cannot name {self} (it is the root, or modules are unknown to it): trace a module that "
                "holds the layer, or call semisparse.densify first"
            )
        if self._forward_hooks or self._forward_pre_hooks:
            raise ExportError(
                f"{path} has forward hooks, which torch.fx would record beside the layer that runs them again: take "
                "them off while tracing, or call semisparse.densify first"
            )
        return input.tracer.create_proxy("call_module", path, (input,), {})

    @staticmethod
    def _check_onnx() -> None:
        if torch.onnx.is_in_onnx_export():
            raise ExportError(
                "ONNX has no operator for pruning: call semisparse.densify(model, weights='masked') before the export"
            )

    @classmethod
    def _announce(cls) -> None:
        """What comes before the first layer of a class is built: FLOP formulas for the ops, warnings of subclasses."""
        register_flop_formulas()

    @classmethod
    def _checked(cls, config: SparseConfig | None) -> SparseConfig | None:
        if config is not None and config.operand != cls.operand:
            raise ConfigError(
                f"config={config} does not fit {cls.__name__}: set {cls.operand}='transposable' and "
                f"{config.operand}=None"
            )
        return config

    def _set_config(self, config: SparseConfig | None) -> None:
        if self._checked(config) is not None:
            self.sparse_config = config  # type: ignore[assignment]
