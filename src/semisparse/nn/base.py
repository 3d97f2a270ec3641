"""Base class of the semi-sparse layers: settings, the two states of a forward, and the swap in place and back."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from semisparse.config import Operand, SparseConfig
from semisparse.errors import ConfigError, LayerRefusedError, ShapeError
from semisparse.flops import register_flop_formulas
from semisparse.functional import semi_sparse_linear
from semisparse.nn.copies import TRANSIENT, CopyableLinear
from semisparse.nn.exporters import fx_call, refuse_onnx, refuse_script
from semisparse.nn.float8 import note_swapped
from semisparse.nn.refusals import bound_sparse, refusal
from semisparse.nn.registry import swapped_class
from semisparse.nn.tensor_parallel import is_sharded, sharded_linear
from semisparse.pattern import GROUP
from semisparse.routes import why_not_fp8
from semisparse.tracing import recording

HELD = ("held_codes", "held_scale", "held_seed")
"""Attributes that a recipe or a schedule sets on a layer with a pruned weight."""


class SemiSparseBase(CopyableLinear):
    """nn.Linear with a SparseConfig, dense or sparse; subclasses add the sparse forward.

    Parameters, their names and shapes are nn.Linear's. There are no buffers, so state_dict keys are the same, too.
    A subclass of your own must set operand again in its body; without that, to_dense takes it for a wrapper.

    Args:
        in_features: K, a multiple of 4.
        out_features: N, a multiple of 4.
        bias: As nn.Linear's.
        device: As nn.Linear's.
        dtype: As nn.Linear's.
        config: Settings of the layer. Default: those of its class.

    Attributes:
        operand: The operand that the class prunes.
        sparse_config: The settings; read-only by convention.
        sparse_enabled: False while a schedule is in a dense phase; the layer then computes exactly what nn.Linear does,
            or with precision="fp8" the same in fp8.
            train() and eval() never change it.

    Raises:
        ShapeError: in_features or out_features is not a multiple of 4.
        ConfigError: config prunes another operand.
    """

    operand: ClassVar[Operand]
    # Class attributes are the defaults, so that a swapped layer needs no __init__ and old pickles keep loading.
    sparse_config: SparseConfig
    sparse_enabled: bool = True
    # Whether an eager forward ran since the swap. forward writes it and never reads it.
    _called: bool = False

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
        """The linear layer with one operand pruned; dense while sparse_enabled is False.

        torch.export records ops that have gradient formulas, torch.fx one call of the layer.

        Args:
            input: (..., K), or a jagged nested tensor of such rows.

        Returns:
            (..., N), in the compute dtype.

        Raises:
            ShapeError, TensorError: The operands do not fit together.
            EngineError: backend="cusparselt" cannot run here.
            ExportError: The call is part of an ONNX export, or torch.fx cannot record it.
        """
        if not torch.compiler.is_compiling():
            if isinstance(input, Proxy):
                return fx_call(self, input)
            (self._stands_for or self).__dict__["_called"] = True
        if not self.sparse_enabled and self.sparse_config.precision is None:
            return F.linear(input, self.weight, self.bias)
        if recording():
            refuse_onnx()
        return self._sparse_forward(input) if self.sparse_enabled else self._dense_forward(input)

    def _sparse_forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _dense_forward(self, input: Tensor) -> Tensor:
        """The forward of a dense phase with a precision of its own."""
        product = partial(semi_sparse_linear, mask=None, precision=self.sparse_config.precision)
        if is_sharded(self.weight):
            return sharded_linear(product, input, self.weight, self.bias)
        return product(input, self.weight, self.bias)

    @classmethod
    def from_dense(cls, linear: nn.Linear, config: SparseConfig | None = None) -> Self:
        """Turn linear into a semi-sparse layer in place: same object, same Parameters, same hooks.

        Reads no data.

        Args:
            linear: On any device (meta, too), in any float dtype. A layer of a registered subclass stays an instance of
                that subclass.
            config: As the class's.

        Returns:
            linear.

        Raises:
            LayerRefusedError: linear cannot be 2:4; the message gives the reason.
            ConfigError: config prunes another operand.
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
        note_swapped(layer, True)
        return layer

    @classmethod
    def to_dense(cls, layer: "SemiSparseBase") -> nn.Linear:
        """Turn a semi-sparse layer back into the dense class that it came from, in place.

        The weight is the dense master weight, unchanged; semisparse.densify can write the pruned weight instead.

        Args:
            layer: A semi-sparse layer.

        Returns:
            layer.

        Raises:
            LayerRefusedError: layer is not a semi-sparse layer, was wrapped after the swap (by FSDP, say), or its
                forward was replaced on the instance and would go on calling the sparse one.
        """
        if not isinstance(layer, SemiSparseBase):
            raise LayerRefusedError(f"layer is a {type(layer).__name__}; to_dense takes a semi-sparse layer")
        reason = bound_sparse(layer)
        if reason is not None:
            raise LayerRefusedError(f"layer has type {type(layer).__name__}: {reason}")
        dense_class = layer._dense_class
        for name in ("sparse_config", "sparse_enabled", *HELD, *TRANSIENT):
            layer.__dict__.pop(name, None)
        layer.__class__ = dense_class  # type: ignore[assignment]
        note_swapped(layer, False)
        return layer

    def pruned_weight(self) -> Tensor:
        """The weight as the sparse forward uses it: N x K, detached, in the parameter's dtype."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The dense class's fields, then the settings, whether the mask is applied, and why not fp8 where asked."""
        config, weight = self.sparse_config, self._parameters.get("weight")
        said = [super().extra_repr(), str(config)]
        if config.prunes:
            said.append("sparse=on" if self.sparse_enabled else "sparse=off (dense phase)")
        if config.precision is not None and weight is not None and (reason := why_not_fp8(weight, weight.dtype)):
            said.append(f"not in fp8: {reason}")
        return ", ".join(said)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; a weight that is set or loaded (assign=True) is known as a semi-sparse layer's, too."""
        super().register_parameter(name, param)
        if name == "weight":
            note_swapped(self, True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        note_swapped(self, False)  # torch swaps no Parameter that something refers to weakly
        try:
            super()._apply(fn, recurse)
        finally:
            note_swapped(self, True)  # to_empty, for one, makes another Parameter
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        note_swapped(self, True)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    @classmethod
    def _announce(cls) -> None:
        """Called before a layer is built or swapped: registers FLOP formulas; subclasses may warn."""
        register_flop_formulas()

    @classmethod
    def _checked(cls, config: SparseConfig | None) -> SparseConfig | None:
        if config is not None and not isinstance(config, SparseConfig):
            raise ConfigError(
                f"config={config!r} is not a SparseConfig; pass SparseConfig(...), or None for the default"
            )
        if config is not None and config.operand != cls.operand:
            raise ConfigError(
                f"config={config!r} does not fit {cls.__name__}: set {cls.operand}='transposable' and "
                f"{config.operand}=None"
            )
        return config

    def _set_config(self, config: SparseConfig | None) -> None:
        if self._checked(config) is not None:
            self.sparse_config = config  # type: ignore[assignment]
