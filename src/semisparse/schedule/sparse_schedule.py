"""When to be sparse: phases counted in applied optimizer steps."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import nn

from semisparse.errors import ScheduleError
from semisparse.nn import SemiSparseBase
from semisparse.schedule.applied_steps import StepEvidence
from semisparse.schedule.phases import Kind, Phase, check_count, checked_state, kind_at, share_of
from semisparse.schedule.ranks import Group, agree, attempt, digest
from semisparse.schedule.scheduled_layers import ScheduledLayers


class SparseSchedule:
    """Switches the semi-sparse layers of a model between sparse and dense as optimizer steps are applied.

    Call step() once after each optimizer.step(), or step(scaler) after scaler.update(). Switching sets a flag on the
    layers: no second swap, no change of parameters. In a dense phase the mask is simply not applied. After the last
    phase its kind stays. Under torch.compile a switch costs one recompilation.

    The first step(), and each step that ends a phase, also looks whether the layers are still what they were, and
    whether somebody made copies of them; see step().

    model: a model that already holds semi-sparse layers. phases: in order. total_steps: if given, the phases must add
    up to it. process_group: ranks that hold the same layers and compare them now (the data-parallel group); None for
    all ranks, where torch.distributed is initialised; False to compare nothing. Raises NoLayerMatchedError when model
    has no semi-sparse layer, ScheduleError when the phases do not fit, RankMismatchError on all ranks when they differ.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        *,
        total_steps: int | None = None,
        process_group: Group = None,
    ) -> None:
        self._start(model, lambda: phases, total_steps, process_group)

    def _start(
        self, model: nn.Module, phases: Callable[[], Sequence[Phase]], total_steps: int | None, group: Group
    ) -> Self:
        self._group = group

        def prepare() -> int:
            self._prepare(model, phases(), total_steps)
            return self._digest()

        agree(attempt(prepare), group)
        self._begin()
        return self

    def _prepare(self, model: nn.Module, phases: Sequence[Phase], total_steps: int | None) -> None:
        """Everything that can fail, before the first change of the model."""
        if not isinstance(phases, Sequence):
            raise ScheduleError(f"phases={phases!r} must be a list of Phase, such as [Phase('sparse', 100)]")
        self._phases = tuple(phases)
        for phase in self._phases:
            if not isinstance(phase, Phase):
                raise ScheduleError(f"phases holds {phase!r}; each must be a Phase, such as Phase('sparse', 100)")
        steps = sum(phase.steps for phase in self._phases)
        if steps == 0:
            raise ScheduleError(f"phases={self._phases} hold no step; give at least one phase with steps > 0")
        if total_steps is not None and steps != total_steps:
            raise ScheduleError(f"phases hold {steps} steps, but total_steps={total_steps}; make them add up")
        self._layers = ScheduledLayers(model)
        self._applied_steps = 0
        self._checked_once = self._was_sparse = False

    def _begin(self) -> None:
        """Take the layers over."""
        self._layers.claim()
        self._watch()
        self._apply()

    def _watch(self) -> None:
        layers = list(self._layers.by_name.values())
        self._evidence = StepEvidence(self._layers.model, lambda: [layer.weight for layer in layers])

    def _digest(self) -> int:
        """What must be the same on all ranks."""
        layers = [(name, layer.sparse_config) for name, layer in self._layers.by_name.items()]
        return digest((self._phases, layers), {})

    @classmethod
    def sparse_then_dense(
        cls, model: nn.Module, total_steps: int, sparse_fraction: float = 0.7, *, process_group: Group = None
    ) -> Self:
        """Sparse for the first round(total_steps * sparse_fraction) steps, dense for the rest."""

        def phases() -> list[Phase]:
            sparse = share_of(total_steps, sparse_fraction, "sparse_fraction")
            return [Phase("sparse", sparse), Phase("dense", total_steps - sparse)]

        return cls.__new__(cls)._start(model, phases, None, process_group)

    @classmethod
    def dense_sparse_dense(
        cls,
        model: nn.Module,
        total_steps: int,
        dense_start_fraction: float,
        sparse_fraction: float,
        *,
        process_group: Group = None,
    ) -> Self:
        """Dense for dense_start_fraction of total_steps, sparse for sparse_fraction, dense for the rest.

        Each boundary is rounded to a whole step.
        """

        def phases() -> list[Phase]:
            start = share_of(total_steps, dense_start_fraction, "dense_start_fraction")
            share_of(total_steps, sparse_fraction, "sparse_fraction")
            if dense_start_fraction + sparse_fraction > 1:
                raise ScheduleError(
                    f"dense_start_fraction={dense_start_fraction} and sparse_fraction={sparse_fraction} exceed 1 "
                    "together"
                )
            end = round(total_steps * (dense_start_fraction + sparse_fraction))
            return [Phase("dense", start), Phase("sparse", end - start), Phase("dense", total_steps - end)]

        return cls.__new__(cls)._start(model, phases, None, process_group)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in order."""
        return self._phases

    @property
    def applied_steps(self) -> int:
        """Optimizer steps counted so far; skipped ones are not among them."""
        return self._applied_steps

    @property
    def phase(self) -> Kind:
        """The kind of the phase that the next forward runs in."""
        return kind_at(self._phases, self._applied_steps)

    def step(self, scaler: torch.amp.GradScaler | None = None, *, skipped: bool | None = None) -> bool:
        """Count one optimizer step and switch the layers when a phase ends. Returns whether the step counted.

        It counts when an optimizer of the model really stepped since the last call, or its weights were written to. So
        it may be called for every micro-batch: only those that ended in a step count. Until a step was seen, a call
        without any gradient in the model counts, too, for loops that a schedule cannot see into: do not call it before
        training begins.
        scaler: the GradScaler, after its update(). A step that it skipped does not count, whatever its policy (see
        StepEvidence). Asking synchronises with the device. skipped: for hosts that say it themselves (accelerate's
        optimizer.step_was_skipped, say); True never counts.

        The first call, and each one that ends a phase, raises ScheduleError, counting nothing, where layers were
        replaced or made dense, or got a computed weight. The first applied step of a sparse phase raises it, too, where
        a layer was not called but trained all the same. Copies that no schedule follows are followed, with a warning.
        Raises ScheduleError for a scaler that is none, or for both arguments.
        """
        _check_arguments(scaler, skipped)
        self._check_layers()
        if not self._evidence.was_applied(scaler, skipped):
            return False
        self._layers.check_called(self._evidence, self._group)
        self._advance()
        return True

    def follow(self, copy: nn.Module) -> None:
        """Switch the layers of copy along from now on: of an average of the weights (AveragedModel, ModelEma), say.

        They take over the phase at once, and masks or scales that a recipe holds. copy: made after the swap, perhaps
        inside a wrapper. Kept weakly. Raises NoLayerMatchedError when it has no layer of this schedule.
        """
        self._share(self._layers.follow(copy))
        self._apply()

    def unfollow(self, copy: nn.Module) -> None:
        """Leave the layers of copy (a snapshot, a fixed teacher) in the phase that they are in."""
        self._layers.unfollow(copy)

    def trust_calls(self) -> None:
        """Do not look for layers that train without being called.

        For models with layers in waiting (experts without tokens) whose weights something else reaches: a penalty on
        all parameters in the loss, or noise added to all gradients.
        """
        self._layers.trust_calls()

    def resume_at(self, applied_steps: int) -> None:
        """Continue after that many applied steps, for hosts that keep only a number. Raises ScheduleError."""
        check_count("applied_steps", applied_steps)
        self._applied_steps = applied_steps
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings: the counter, the phases and the last scale seen."""
        return {
            "applied_steps": self._applied_steps,
            "phases": [asdict(phase) for phase in self._phases],
            "last_scale": self._evidence.last_scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state was saved, also in mid-phase. Raises ScheduleError, changing nothing, on a misfit."""
        self._applied_steps, self._evidence.last_scale = checked_state(state, self._phases)
        self._apply()

    def __repr__(self) -> str:
        plan = " -> ".join(f"{phase.steps} {phase.kind}" for phase in self._phases)
        copies = f"; {self._layers.followers} layers of copies follow" if self._layers.followers else ""
        return f"{type(self).__name__}({plan}; {self._applied_steps} applied, now {self.phase}{copies})"

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: with their model, in the same phase, watching the optimizers that move it."""
        group = None if self._group is not False else False  # a group of processes does not travel
        return {**self.__dict__, "_evidence": self._evidence.last_scale, "_group": group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()
        self._evidence.last_scale = state["_evidence"]

    def _check_layers(self) -> None:
        """Once at first, and whenever the coming step ends a phase."""

        def look() -> int:
            self._layers.check_present()
            self._adopt()
            return 0

        if not self._checked_once:
            agree(attempt(look), self._group)  # every rank comes here, so that none waits for one that raises
        elif kind_at(self._phases, self._applied_steps + 1) != self.phase:
            look()
        self._checked_once = True

    def _adopt(self) -> None:
        """Take copies along that nobody follows."""
        self._share(self._layers.adopt_copies())

    def _share(self, pairs: list[tuple[SemiSparseBase, SemiSparseBase]]) -> None:
        """Give what a recipe holds on our layers to the copies that follow them."""
        for ours, theirs in pairs:
            frozen = ours.__dict__.get("_frozen")
            if frozen is not None and ours.sparse_config == theirs.sparse_config:
                theirs._frozen = frozen

    def _advance(self) -> None:
        self._applied_steps += 1
        self._apply()

    def _apply(self) -> None:
        sparse = self.phase == "sparse"
        if sparse and self._layers.awaits_calls and not self._was_sparse:
            self._evidence.watch_gradients(True)
        self._was_sparse = sparse
        self._layers.switch(sparse)


def _check_arguments(scaler: object, skipped: object) -> None:
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise ScheduleError(
            f"step({scaler!r}): the argument is a torch.amp.GradScaler; leave it out where there is none, or say "
            "step(skipped=...) where the host only tells whether it skipped"
        )
    if skipped is not None and not isinstance(skipped, bool):
        raise ScheduleError(f"skipped={skipped!r} must be True, False or None")
    if scaler is not None and skipped is not None:
        raise ScheduleError(f"step(scaler, skipped={skipped}): give one of the two")
