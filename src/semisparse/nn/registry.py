"""Which classes of linear layers may be swapped, and the semi-sparse class that each becomes."""

import types
from typing import Any

from torch import nn

from semisparse.errors import ConfigError
from semisparse.nn.float8 import is_float8_class

_PLAIN_LINEARS: set[type[nn.Linear]] = {nn.Linear}
_SWAPPED: dict[tuple[type[nn.Linear], type[nn.Linear]], type[Any]] = {}
OWN_ATTRIBUTES = (
    "operand",
    "sparse_config",
    "sparse_enabled",
    "gathered_codes",
    "has_mask",
    "hold",
    "holds",
    "held_codes",
    "held_scale",
    "held_seed",
    "_mask",
    "_packed",
    "_called",
    "_dense_forward",
    "_sparse_forward",
)
"""Names that a semi-sparse layer uses besides those of nn.Linear."""


def register_linear(cls: type[nn.Linear]) -> type[nn.Linear]:
    """Allow layers whose type is exactly cls to be swapped; usable as a class decorator.

    Registering states that cls.forward computes F.linear(x, self.weight, self.bias) and nothing else, because the swap
    replaces it. A swapped layer is still an instance of cls, with its methods and attributes; swapping back restores
    cls.

    Args:
        cls: A subclass of nn.Linear.

    Returns:
        cls.

    Raises:
        ConfigError: cls is not a dense subclass of nn.Linear, is lazy, is torchao's Float8Linear (sparsify takes it
            with take_float8=True), or has a name that semi-sparse layers use.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Linear)) or hasattr(cls, "_sparse_forward"):
        raise ConfigError(f"cls={cls!r} must be a dense subclass of torch.nn.Linear")
    if issubclass(cls, nn.modules.lazy.LazyModuleMixin):
        raise ConfigError(
            f"cls={cls.__name__} is lazy: its layers become another class at their first forward; register that one, "
            "and swap after a forward"
        )
    if is_float8_class(cls):
        raise ConfigError(
            f"cls={cls.__name__} computes in float8, not F.linear: pass take_float8=True to sparsify, which makes such "
            "layers semi-sparse"
        )
    if taken := sorted(name for name in OWN_ATTRIBUTES if hasattr(cls, name)):
        raise ConfigError(f"cls={cls.__name__} has {taken}, which semi-sparse layers use themselves; rename them")
    _PLAIN_LINEARS.add(cls)
    return cls


def is_registered(cls: type[nn.Linear]) -> bool:
    """Whether layers of exactly this class may be swapped."""
    return cls in _PLAIN_LINEARS


def swapped_class(base: type[nn.Linear], dense_class: type[nn.Linear]) -> type[Any]:
    """The class of a swapped layer.

    Args:
        base: A semi-sparse layer class.
        dense_class: nn.Linear or a registered subclass.

    Returns:
        base itself for nn.Linear, otherwise a subclass of both.

    Raises:
        ConfigError: Python cannot combine the two classes.
    """
    if dense_class is nn.Linear:
        return base
    if (base, dense_class) not in _SWAPPED:
        _SWAPPED[base, dense_class] = _combined(base, dense_class)
    return _SWAPPED[base, dense_class]


def _combined(base: type[nn.Linear], dense_class: type[nn.Linear]) -> type[Any]:
    def body(namespace: dict[str, Any]) -> None:
        namespace |= {
            "__module__": dense_class.__module__,
            "__qualname__": prefix + dense_class.__qualname__,
            "__doc__": f"{base.__name__} made of {dense_class.__name__}.",
            "operand": base.operand,  # type: ignore[attr-defined]
            "_dense_class": dense_class,
            "_swapped_base": base,
        }

    prefix = base.__name__.removesuffix("Linear")
    try:
        return types.new_class(prefix + dense_class.__name__, (base, dense_class), exec_body=body)
    except TypeError as error:
        raise ConfigError(f"{dense_class.__name__} cannot be combined with {base.__name__}: {error}") from error


def rebuild(base: type[nn.Linear], dense_class: type[nn.Linear]) -> nn.Linear:
    """An empty layer of swapped_class(base, dense_class); copy and pickle cannot import such a class by name."""
    cls = swapped_class(base, dense_class)
    layer: nn.Linear = nn.Linear.__new__(cls)
    return layer
