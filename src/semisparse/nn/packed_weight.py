"""The packed weight of one layer: what it was packed from, and whether a forward may use it.

The check runs at every forward of every layer, so it compares numbers that were read when the weight was packed.
"""

from functools import cache
from typing import Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from semisparse import routes
from semisparse.config import SparseConfig
from semisparse.formats.layout import FP8, PACKED_DTYPES
from semisparse.formats.packed import PackedMatrix
from semisparse.masks import MaskName
from semisparse.operands import compute_dtype
from semisparse.tracing import note_compute_dtype, recording


class PackingLayer(Protocol):
    """The part of SemiSparseLinear that packing needs."""

    in_features: int
    out_features: int
    _parameters: dict[str, torch.nn.Parameter | None]
    sparse_config: SparseConfig
    sparse_enabled: bool
    held_codes: Tensor | None
    held_scale: Tensor | None

    @property
    def _mask(self) -> MaskName:
        """The name of its mask."""
        ...

    _packed: "PackedWeight | None"


class Owner(Protocol):
    """What packs the weights of a model, and is asked where a packed weight does not fit a forward."""

    def renewed(
        self, layer: PackingLayer, record: "PackedWeight", weight: Tensor, dtype: torch.dtype
    ) -> PackedMatrix | None:
        """A packed weight for this forward, or None, where the forward packs for itself."""

    def held_changed(self, layer: PackingLayer, record: "PackedWeight") -> None:
        """Make record right, or unusable: layer holds other codes or another scale than were packed."""


class PackedWeight:
    """A packed weight and the state that it was packed from. It belongs to one layer and to one owner.

    Copies and pickles of it are None: a copy of a layer packs its own weight. (Parametrised modules copy their dict,
    not their state.)

    Args:
        owner: What packs it.

    Attributes:
        owner: A weak reference to that.
        packed: The buffers; None until the weight is packed.
        dtype: The compute dtype that it was packed for, FP8 for all of fp8; None as long as it may not be used.
        pending: Set where a forward packed on its own stream, until that is known to be done.
    """

    def __init__(self, owner: Owner) -> None:
        self.owner = ref(owner)
        self.packed: PackedMatrix | None = None
        self.dtype: torch.dtype | None = None
        self.pending: torch.cuda.Event | None = None
        self._device_type = "cpu"
        self._weight: ReferenceType[Tensor] | None = None
        self._version = self._address = -1
        self._stored: torch.dtype | None = None
        self._config: SparseConfig | None = None
        self._held: tuple[object, ...] = ()

    def __deepcopy__(self, memo: object) -> None:
        """None, as for every copy."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @property
    def weight(self) -> Tensor | None:
        """The weight that it belongs to, as long as that exists."""
        return None if self._weight is None else self._weight()

    def adopt(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Belong to weight and dtype from now on; what was packed of or for another one may not be used."""
        if self.weight is not weight or self.dtype is not dtype:
            self._weight, self.dtype = ref(weight), None

    def note(self, layer: PackingLayer, weight: Tensor, version: int) -> None:
        """Record the state of weight and settings that is being packed; version is the weight's."""
        self._weight, self._version, self._address = ref(weight), version, weight.data_ptr()
        self._config, self._held = layer.sparse_config, _held(layer.held_codes, layer.held_scale)
        self._device_type, self._stored = weight.device.type, weight.dtype

    def renew(self, version: int) -> None:
        """Record that the weight was packed again as it is now, with all else as noted before."""
        self._version, self.pending = version, None

    def fits(self, layer: PackingLayer, weight: Tensor) -> bool:
        """Whether weight, held tensors and settings are what was packed. Writes through .data do not show."""
        codes, scale = layer.held_codes, layer.held_scale
        return (
            self._weight is not None
            and self._weight() is weight
            and weight._version == self._version
            and weight.data_ptr() == self._address
            and weight.dtype is self._stored
            and layer.sparse_config is self._config
            and ((codes is None and scale is None and not self._held) or self._held == _held(codes, scale))
        )


def usable(layer: PackingLayer, weight: Tensor, x: Tensor) -> PackedMatrix | None:
    """The packed weight for this forward; None where the forward must pack for itself.

    In compiled code only the dtype is compared, and whether weight is the layer's own (in functional_call it is not):
    versions cannot be read there.

    Args:
        layer: The layer whose forward runs, with a packed weight.
        weight: Its weight, read once by the caller.
        x: Its input.
    """
    record = layer._packed
    assert record is not None
    if recording():  # a recorded graph packs the weight that it will be run with
        return None
    if torch.compiler.is_compiling():
        dtype = FP8 if packs_in_fp8(layer, weight) else compute_dtype(x, weight)
        if record.dtype is not dtype:
            if weight.dtype is torch.float32 and dtype is not FP8:  # others are packed for their own dtype
                note_compute_dtype(dtype)
            return None
        return record.packed if record.weight is weight else None
    dtype = compute_dtype(x, weight) if torch.is_autocast_enabled(record._device_type) else weight.dtype
    # What fits was packed with these settings, and in fp8 for every dtype.
    if (record.dtype is dtype or record.dtype is FP8) and record.pending is None and record.fits(layer, weight):
        return record.packed
    owner, dtype = record.owner(), FP8 if packs_in_fp8(layer, weight) else dtype
    return None if owner is None or dtype not in PACKABLE else owner.renewed(layer, record, weight, dtype)


PACKABLE = (*PACKED_DTYPES, FP8)
"""What weights are packed for: a compute dtype, or fp8 for whatever is computed in around it."""


def packs_in_fp8(layer: PackingLayer, weight: Tensor) -> bool:
    """Whether layer packs weight in fp8: it asks for that, and size, dtype and device of the weight fit."""
    config = layer.sparse_config
    return config.precision is not None and routes.takes_fp8(weight, weight.dtype, None, config.backend)


# The packed weights that layers may use, the one in use last: blocks nest and end in any order.
_OPEN: WeakKeyDictionary[PackingLayer, list[PackedWeight]] = WeakKeyDictionary()


def open_on(layer: PackingLayer, record: PackedWeight) -> None:
    """Let the forwards of layer use record until close_on."""
    _OPEN.setdefault(layer, []).append(record)
    layer._packed = record
    _fused_steps_show()


def close_on(layer: PackingLayer, record: PackedWeight) -> None:
    """Stop using record; the packed weight that was opened before it, if there is one, is used again."""
    left = [other for other in _OPEN.get(layer, ()) if other is not record]
    if left:
        _OPEN[layer], layer._packed = left, left[-1]
    else:
        _OPEN.pop(layer, None)
        vars(layer).pop("_packed", None)


def held_changed(layer: PackingLayer) -> None:
    """Tell the owners of the packed weights of layer that it holds other tensors: compiled code does not look."""
    for record in _OPEN.get(layer, ()):
        owner = record.owner()
        if owner is not None and record.dtype is not None:
            owner.held_changed(layer, record)


def in_use(layer: PackingLayer, buffers: PackedMatrix) -> bool:
    """Whether an open packed weight of layer lies in buffers."""
    return any(record.packed is not None and record.packed.matrix is buffers.matrix for record in _OPEN.get(layer, ()))


def _held(codes: Tensor | None, scale: Tensor | None) -> tuple[object, ...]:
    """What tells two states of held tensors apart."""
    return tuple(
        (at, id(tensor), tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)
        for at, tensor in enumerate((codes, scale))
        if tensor is not None
    )


@cache
def _fused_steps_show() -> None:
    """Raise the version of packed weights after fused optimizer steps; torch 2.11 to 2.13 do not."""
    register_optimizer_step_post_hook(_raise_versions)


def _raise_versions(optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    if torch.compiler.is_compiling() or not _OPEN:
        return
    fused = [group for group in optimizer.param_groups if group.get("fused")]
    if not fused:
        return
    packed = {id(weight) for records in list(_OPEN.values()) for r in records if (weight := r.weight) is not None}
    if written := [p for group in fused for p in group["params"] if id(p) in packed]:
        torch.autograd.graph.increment_version(written)
