"""The packed weights of a model, packed together and kept for the forwards that follow."""

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from semisparse import routes
from semisparse.arguments import check_choice, check_module
from semisparse.errors import EngineError, SemiSparseError
from semisparse.forks import renewed_in_children
from semisparse.formats.layout import FP8, PACKED_DTYPES
from semisparse.formats.packed import PackedMatrix
from semisparse.nn.linear import SemiSparseLinear
from semisparse.nn.pack_together import Keep, Member, both_ways, fit, new_buffers, pack_together
from semisparse.nn.packed_weight import PACKABLE, PackedWeight, PackingLayer, close_on, open_on, packs_in_fp8
from semisparse.nn.repetition import Repetition
from semisparse.nn.whole_weights import managed_by_fsdp, plain_call, why_not_whole
from semisparse.operands import autocast_enabled
from semisparse.tracing import noted_compute_dtypes

logger = logging.getLogger(__name__)


class PackedWeights:
    """Packs the weights of a model's SemiSparseLinear layers when told to, instead of at each forward.

    pack() packs all weights of one stored dtype, compute dtype and mask in one launch. Forwards then use the result. It
    lies in buffers that keep their addresses, so that compiled and captured steps read what was packed last:

        packed = PackedWeights(model)
        packed.pack()
        ... optimizer.step(); packed.pack()

    SparseSchedule(..., pack="per_step") does this by itself.

    *Eager* forwards are right whoever writes the weights. They compare version and address of the weight, the held
    tensors and the settings with what was packed. The first forward that finds a difference packs all weights that
    changed. It writes to the same buffers, so that the backward of an older graph raises PyTorch's error for variables
    that were modified in place. Writes through weight.data, by replayed CUDA graphs and by kernels that raise no
    version leave no trace.

    *Compiled and captured* code reads the buffers and compares nothing but the dtype. A call of layer.hold packs the
    layer again at once; writes into what it holds are seen after pack(). After load_state_dict, after a swap with
    averaged weights, and after writes as above, call pack(everything=True).

    16-bit weights are packed for computing in their own dtype, fp32 weights for autocast's, once pack() was called
    inside torch.autocast or a forward ran in it. A forward in another dtype packs for itself, with a warning. With
    precision="fp8" a weight is packed in e4m3 for all dtypes, also on the CPU. Frozen weights are packed once, until
    they change. Layers in a dense phase hold nothing.

    A sharded (FSDP), offloaded, computed (parametrised) or inference weight cannot be packed between forwards. Such
    layers pack at each forward; that is logged once, and `fallbacks` has the reasons.

    Packed weights are never part of a state_dict. A copy of this object belongs to the copied model and has packed
    nothing.

    Args:
        model: Any module. The first pack() reads it.
        keep: "both" holds what forward and backward need, 9/8 of the weights' 16-bit bytes. "forward" holds half of
            that; the backward packs the other half from the weight, which costs time. Of weights in fp8 both are held
            in any case: 5/8 of those bytes.

    Attributes:
        fallbacks: Name of a layer -> why it packs at each forward, as of the last call. Layers on the masked-dense
            route are not among them; semisparse.check reports those.
        ready: False lets all layers pack at each forward for now.

    Raises:
        ConfigError: model is not a module, or keep not one of these.
    """

    def __init__(self, model: nn.Module, *, keep: Keep = "both") -> None:
        check_module(model)
        check_choice("keep", keep, Keep)
        self._keep: Keep = keep
        self.fallbacks: dict[str, str] = {}
        self.ready = True
        self._model = model
        self._records: dict[PackingLayer, PackedWeight] = {}
        self._autocast: torch.dtype | None = None
        self._again: Repetition | None = None
        self._noted_before = len(noted_compute_dtypes())
        self._logged = False
        self._lock = threading.RLock()
        renewed_in_children(self, "_lock", threading.RLock)
        # If this object is dropped without close(), nothing keeps the packed weights current any longer.
        weakref.finalize(self, _close, self._records).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(PackedWeights, keep=self._keep), (self._model,)

    def __repr__(self) -> str:
        return f"PackedWeights(keep={self._keep!r}, {self.layers} layers packed, {len(self.fallbacks)} fallbacks)"

    @property
    def layers(self) -> int:
        """The number of layers whose packed weight is in use."""
        return sum(record.dtype is not None for record in self._records.values())

    def pack(self, *, everything: bool = False) -> int:
        """Pack the current weights of all layers that are sparse now and take the packed route.

        Does not synchronise. While a CUDA graph is captured, the launch becomes part of the graph.

        Args:
            everything: Also frozen weights that show no change.

        Returns:
            The number of layers whose packed weight is in use.

        Raises:
            ConfigError: A layer's mask needs a scale that no recipe has set. Nothing is held then.
        """
        with self._lock:
            again, self._again = self._again, None
            if again is not None and self.ready and not everything and again.holds():
                again.run()
                self._again = again
                return len(again)
            try:
                members = self._survey()
                wanted = [m for m in members if everything or m.weight.requires_grad or not m.fits]
                launches = self._pack(wanted)
            except BaseException:
                self.close()
                raise
            self._log_fallbacks()
            if not self.fallbacks:
                self._again = Repetition.of(members, self._model, launches)
            return self.layers

    def pack_changed(self) -> None:
        """As pack(), but only weights that show a change."""
        with self._lock:
            self._again = None
            self._pack([m for m in self._survey() if not m.fits])

    def close(self) -> None:
        """Let go of all packed weights and their memory; layers pack at each forward again."""
        with self._lock:
            self._again = None
            _close(self._records)

    def renewed(
        self, layer: PackingLayer, record: PackedWeight, weight: Tensor, dtype: torch.dtype
    ) -> PackedMatrix | None:
        """The packed weight for an eager forward that found another one than it needs; None if it packs for itself.

        Args:
            layer: The layer whose forward runs.
            record: Its packed weight.
            weight: Its weight in this forward.
            dtype: The forward's compute dtype, fp16 or bf16, or FP8.
        """
        if self._autocast is None and weight.dtype is torch.float32 and dtype is not FP8:
            self._autocast = dtype
        # Another weight is not the layer's own (functional_call).
        if not self.ready or record.weight is not weight or not plain_call(weight):
            return None
        if dtype is not FP8 and dtype is not self._forwards_dtype(weight):
            _warn_of_dtype(weight.dtype, self._forwards_dtype(weight), dtype)
            return None
        with self._lock:
            if not Member(layer, record, weight, dtype).fits:
                self._pack([m for m in self._known() if not m.fits], waited_for=True)
            if not Member(layer, record, weight, dtype).fits:
                return None
            if record.pending is not None and record.pending.query():
                record.pending = None
            elif record.pending is not None:
                torch.cuda.current_stream(weight.device).wait_event(record.pending)
            return record.packed

    def held_changed(self, layer: PackingLayer, record: PackedWeight) -> None:
        """Pack the weight of layer again, because it holds other codes or another scale.

        Args:
            layer: The layer.
            record: Its packed weight, in use.
        """
        with self._lock:
            member = self._member(layer, record)
            record.dtype = None
            if member is not None and plain_call(member.weight):
                with suppress(SemiSparseError):  # the next forward raises it
                    self._pack([member])

    def _known(self) -> list[Member]:
        """The layers that have records, as far as their own weights are there."""
        members = (self._member(layer, record) for layer, record in self._records.items())
        return [member for member in members if member is not None]

    def _member(self, layer: PackingLayer, record: PackedWeight) -> Member | None:
        """A layer that has a record; None where it was made dense since, or its own weight cannot be packed now."""
        if not isinstance(layer, SemiSparseLinear) or not layer.sparse_enabled or why_not_whole(layer):
            return None
        member = Member(layer, record, layer.weight, self._packed_for(layer, layer.weight))
        return member if member.weight is record.weight and member.dtype in PACKABLE else None

    def _survey(self) -> list[Member]:
        """The layers that can be packed now. Opens records on them, and closes those of all others."""
        members, self.fallbacks = [], {}
        sharded = managed_by_fsdp(self._model)
        for name, layer in self._model.named_modules():
            if not isinstance(layer, SemiSparseLinear) or not layer.sparse_enabled or not layer.has_mask:
                continue
            if reason := "FSDP gathers its weight in the forward" if sharded else why_not_whole(layer):
                self.fallbacks[name] = reason
                continue
            weight = layer.weight
            dtype = self._packed_for(layer, weight)
            if _takes_packed_route(layer, weight, dtype):
                record = self._record(layer)
                record.adopt(weight, dtype)
                members.append(Member(layer, record, weight, dtype))
        _close(self._records, self._records.keys() - {member.layer for member in members})
        return [member for member in members if member.dtype in PACKABLE]

    def _record(self, layer: PackingLayer) -> PackedWeight:
        """The record of layer; a new one where there is none, or to_dense took it off the layer."""
        record = self._records.get(layer)
        if record is not None and layer._packed is None:
            close_on(layer, self._records.pop(layer))
            record = None
        if record is None:
            record = self._records[layer] = PackedWeight(self)
            open_on(layer, record)
        return record

    def _packed_for(self, layer: PackingLayer, weight: Tensor) -> torch.dtype:
        """FP8, or the compute dtype to pack weight for."""
        return FP8 if packs_in_fp8(layer, weight) else self._dtype(weight)

    def _dtype(self, weight: Tensor) -> torch.dtype:
        """The compute dtype to pack weight for; one that cannot be packed where it is not known yet."""
        if autocast_enabled(weight.device):
            self._autocast = torch.get_autocast_dtype(weight.device.type)
        return self._forwards_dtype(weight)

    def _forwards_dtype(self, weight: Tensor) -> torch.dtype:
        """The dtype that forwards compute in: the weight's, or for fp32 what autocast or code compiled since has shown.

        Layers with 16-bit weights may run outside of the autocast that other layers run in.
        """
        if weight.dtype is not torch.float32:
            return weight.dtype
        noted = noted_compute_dtypes()[self._noted_before :]
        return self._autocast or (noted[-1] if noted else torch.float32)

    def _pack(self, members: list[Member], *, waited_for: bool = False) -> list[Callable[[], None] | None]:
        return pack_together(members, self._buffers, waited_for=waited_for) if self.ready else []

    def _buffers(self, member: Member) -> PackedMatrix:
        """Where to pack member: where it was packed before, if that fits."""
        record, both = member.record, both_ways(member, self._keep)
        if record.packed is None or not fit(record.packed, member.weight, member.dtype, both):
            record.packed, record.dtype = new_buffers(member.weight, member.dtype, both), None
        return record.packed

    def _log_fallbacks(self) -> None:
        if self.fallbacks and not self._logged:
            self._logged = True
            name, reason = next(iter(self.fallbacks.items()))
            logger.warning(
                "%d layers pack at each forward, not once per step; the first is %s: %s",
                len(self.fallbacks),
                name or "(root)",
                reason,
            )


def _warn_of_dtype(stored: torch.dtype, packed: torch.dtype, dtype: torch.dtype) -> None:
    if stored is torch.float32:
        way_out = "pack inside the torch.autocast that forwards run in"
    else:
        way_out = f"convert the layer to {dtype}, or to fp32 and pack inside that torch.autocast"
    warnings.warn(
        f"weights in {stored} are packed for computing in {packed}, but this forward computes in {dtype}: {way_out}. "
        "The weight is packed again at this forward.",
        stacklevel=6,
    )


def _takes_packed_route(layer: PackingLayer, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether forwards of layer take the packed route: in fp8, in dtype or, where that is wider, under autocast."""
    try:
        if dtype is FP8:
            return routes.takes_fp8(weight, weight.dtype, layer._mask, layer.sparse_config.backend)
        return routes.packs(weight, dtype if dtype in PACKED_DTYPES else torch.bfloat16, layer.sparse_config.backend)
    except EngineError:
        return False  # the forward raises it


def _close(records: dict[PackingLayer, PackedWeight], layers: Iterable[PackingLayer] | None = None) -> None:
    for layer in list(records if layers is None else layers):
        close_on(layer, records.pop(layer))
