"""When to be sparse: phases counted in applied optimizer steps."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import nn

from semisparse.errors import ScheduleError
from semisparse.nn import PackedWeights
from semisparse.nn.pack_together import Keep
from semisparse.schedule.applied_steps import StepEvidence, check_step_arguments
from semisparse.schedule.called_layers import check_called
from semisparse.schedule.phases import (
    Kind,
    Phase,
    Saved,
    check_count,
    checked_phases,
    checked_state,
    dense_sparse_dense,
    ended_early,
    kind_at,
    sparse_then_dense,
)
from semisparse.schedule.ranks import Group, agree, attempt, digest
from semisparse.schedule.scheduled_layers import ScheduledLayers
from semisparse.schedule.seeds import Seeds
from semisparse.schedule.step_packing import Pack, StepPacking


class SparseSchedule:
    """Switches the semi-sparse layers of a model between sparse and dense as optimizer steps are applied.

    Call step() once after each optimizer.step(), or step(scaler) after scaler.update(). Switching sets a flag on the
    layers: no second swap, no change of parameters. In a dense phase the mask is not applied. After the last phase its
    kind stays. Under torch.compile a switch costs one recompilation.

    Args:
        model: A model that already holds semi-sparse layers.
        phases: In order.
        total_steps: If given, the phases must add up to it.
        process_group: Ranks that hold the same layers and compare them now (the data-parallel group); None for all
            ranks if torch.distributed is initialised; False to compare nothing.
        pack: When weights are packed: "each_forward", which is right whatever writes to them, or "per_step", once after
            each optimizer step (PackedWeights says what that takes).
        keep: As PackedWeights', with pack="per_step".
        seed: Of the random numbers of grad_output="mvue": a whole number, the same on all ranks. Layers and ranks draw
            their own numbers from it, other ones after each applied step. Saved and loaded with the state.

    Raises:
        NoLayerMatchedError: model has no semi-sparse layer.
        ConfigError: pack, keep or seed is not one of its values.
        ScheduleError: phases is not a list of Phase, or does not add up; or torchao's conversion to float8 replaced a
            layer after sparsify, or a weight cannot be pruned any longer, such as under FSDP1.
        RankMismatchError: The ranks hold different layers or phases; raised on all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        phases: Sequence[Phase],
        *,
        total_steps: int | None = None,
        process_group: Group = None,
        pack: Pack = "each_forward",
        keep: Keep = "both",
        seed: int = 0,
    ) -> None:
        self._start(model, lambda: phases, total_steps, process_group, pack, keep, seed)

    def _start(
        self,
        model: nn.Module,
        phases: Callable[[], Sequence[Phase]],
        total_steps: int | None,
        group: Group,
        pack: Pack,
        keep: Keep,
        seed: int,
    ) -> Self:
        self._group = group

        def prepare() -> int:
            self._prepare(model, phases(), total_steps, pack, keep, seed)
            return self._digest()

        agree(attempt(prepare), group)
        self._begin()
        self.refresh()
        return self

    def _prepare(
        self, model: nn.Module, phases: Sequence[Phase], total_steps: int | None, pack: Pack, keep: Keep, seed: int
    ) -> None:
        """Everything that can fail, before the first change of the model."""
        self._phases = self._planned = checked_phases(phases, total_steps)
        self._ended_at: int | None = None
        self._layers = ScheduledLayers(model)
        self._packing = StepPacking(self._layers, pack, keep)
        self._seeds = Seeds(self._layers.by_name, seed, self._group)
        self._applied_steps = 0
        self._checked_once = self._was_sparse = False

    def _begin(self) -> None:
        """Take control of the layers."""
        self._layers.claim()
        self._watch()
        self._seeds.place(self._applied_steps)
        self._apply()

    def _watch(self) -> None:
        layers = list(self._layers.by_name.values())
        self._evidence = StepEvidence(self._layers.model, lambda: [layer.weight for layer in layers])

    def _digest(self) -> int:
        """Of everything that must be the same on all ranks."""
        layers = [(name, layer.sparse_config) for name, layer in self._layers.by_name.items()]
        return digest((self._phases, layers, self._seeds.seed), {})

    @classmethod
    def sparse_then_dense(
        cls,
        model: nn.Module,
        total_steps: int,
        sparse_fraction: float = 0.7,
        *,
        process_group: Group = None,
        pack: Pack = "each_forward",
        keep: Keep = "both",
        seed: int = 0,
    ) -> Self:
        """A schedule that is sparse for the first steps and dense for the rest.

        Args:
            model: As for SparseSchedule.
            total_steps: Applied optimizer steps of the whole run.
            sparse_fraction: Share of them that is sparse, rounded to a whole step.
            process_group: As for SparseSchedule.
            pack: As for SparseSchedule.
            keep: As for SparseSchedule.
            seed: As for SparseSchedule.

        Raises:
            ConfigError: As for SparseSchedule.
            ScheduleError: total_steps is not a number of steps, or sparse_fraction is not between 0 and 1.
            NoLayerMatchedError: As for SparseSchedule.
            RankMismatchError: As for SparseSchedule.
        """
        return cls.__new__(cls)._start(
            model, lambda: sparse_then_dense(total_steps, sparse_fraction), None, process_group, pack, keep, seed
        )

    @classmethod
    def dense_sparse_dense(
        cls,
        model: nn.Module,
        total_steps: int,
        dense_start_fraction: float,
        sparse_fraction: float,
        *,
        process_group: Group = None,
        pack: Pack = "each_forward",
        keep: Keep = "both",
        seed: int = 0,
    ) -> Self:
        """A schedule that starts dense, then is sparse, and is dense for the rest.

        Args:
            model: As for SparseSchedule.
            total_steps: Applied optimizer steps of the whole run.
            dense_start_fraction: Share of them that is dense at the start.
            sparse_fraction: Share of them that is sparse. Each boundary is rounded to a whole step.
            process_group: As for SparseSchedule.
            pack: As for SparseSchedule.
            keep: As for SparseSchedule.
            seed: As for SparseSchedule.

        Raises:
            ConfigError: As for SparseSchedule.
            ScheduleError: total_steps is not a number of steps, or a fraction or their sum is not between 0 and 1.
            NoLayerMatchedError: As for SparseSchedule.
            RankMismatchError: As for SparseSchedule.
        """
        return cls.__new__(cls)._start(
            model,
            lambda: dense_sparse_dense(total_steps, dense_start_fraction, sparse_fraction),
            None,
            process_group,
            pack,
            keep,
            seed,
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases in order, as they are after end_sparse_phase()."""
        return self._phases

    @property
    def applied_steps(self) -> int:
        """Optimizer steps counted so far, without skipped ones."""
        return self._applied_steps

    @property
    def phase(self) -> Kind:
        """The kind of the phase that the next forward runs in."""
        return kind_at(self._phases, self._applied_steps)

    def step(self, scaler: torch.amp.GradScaler | None = None, *, skipped: bool | None = None) -> bool:
        """Count one optimizer step, and switch the layers if a phase ends with it.

        A step counts if an optimizer of the model stepped since the last call, or its weights were written to. So
        step() may be called for every micro-batch: only those that ended in an optimizer step count. Until a step was
        seen, a call while the model has no gradient at all also counts, for loops that a schedule cannot observe: do
        not call it before training begins.

        The first call, and each call that ends a phase, first checks that the layers are still what they were, and
        lets copies follow that no schedule switches, with a warning.

        Args:
            scaler: The GradScaler, after its update(). A step that it skipped does not count, whatever its policy.
                Synchronises with the device.
            skipped: For frameworks that know whether they skipped the step, such as accelerate's
                optimizer.step_was_skipped. True never counts.

        Returns:
            Whether the step counted.

        Raises:
            ScheduleError: `scaler` is not a `torch.amp.GradScaler`, or both arguments are given. A layer was replaced,
                made dense or got a computed weight; nothing is counted then. Or, after the first applied step of a
                sparse phase, a layer was trained without being called.
        """
        check_step_arguments(scaler, skipped)
        self._check_layers()
        if not self._evidence.was_applied(scaler, skipped):
            self._packing.pack_changed()
            return False
        check_called(self._layers, self._evidence, self._group)
        self._advance()
        self._packing.pack()
        return True

    @property
    def packed_weights(self) -> PackedWeights | None:
        """The weights that are packed per step; its `fallbacks` says which are not. None with pack="each_forward"."""
        return self._packing.weights

    def refresh(self) -> None:
        """Pack all weights again, for what pack="per_step" cannot see.

        Call it after something other than the optimizer wrote to the weights of a compiled or captured model
        (load_state_dict, a swap with averaged weights), after writes through weight.data or by kernels that raise no
        version, and after replays of a CUDA graph that holds the optimizer step. Inside torch.autocast it packs fp32
        weights for that dtype from now on. With pack="each_forward" it does nothing.
        """
        self._packing.pack(everything=True)

    def follow(self, copy: nn.Module) -> None:
        """Switch the layers of copy together with the model's from now on: an average of the weights, for example.

        They take over the phase at once, and masks or scales that a recipe holds.

        Args:
            copy: A copy of the model made after the swap, perhaps inside a wrapper (AveragedModel, ModelEma). Only a
                weak reference is kept.

        Raises:
            NoLayerMatchedError: copy has no layer of this schedule.
        """
        self._layers.follow(copy)
        self._apply()

    def unfollow(self, copy: nn.Module) -> None:
        """Leave the layers of copy (a snapshot, a fixed teacher) in their current phase."""
        self._layers.unfollow(copy)

    @property
    def ended_at(self) -> int | None:
        """Applied steps at which end_sparse_phase() was called; None if it was not."""
        return self._ended_at

    def end_sparse_phase(self) -> None:
        """End the sparse phase now: all later steps are dense, also where another sparse phase was planned.

        `phases` and the state then say so. Call it after step(), on each rank of the group at the same step.

        Raises:
            ScheduleError: The phase is dense, or a layer is not what it was (as for step); nothing is changed.
            RankMismatchError: The ranks are at different steps or in different phases.
        """

        def prepare() -> int:
            if self.phase != "sparse":
                raise ScheduleError(f"end_sparse_phase() in a dense phase, after {self._applied_steps} applied steps")
            return self._look()

        agree(attempt(prepare), self._group)
        self._ended_at = self._applied_steps
        self._phases = ended_early(self._phases, self._applied_steps)
        self._apply()
        self.refresh()

    def trust_calls(self) -> None:
        """Turn off the check for layers that train without being called.

        For models with idle layers (experts without tokens) whose weights something else changes: a penalty on all
        parameters in the loss, or noise added to all gradients.
        """
        self._layers.trust_calls()
        self._evidence.watch_gradients(False)
        self.refresh()

    def resume_at(self, applied_steps: int) -> None:
        """Continue after applied_steps steps, for frameworks that save only this number.

        It does not say whether the sparse phase was ended early.

        Raises:
            ScheduleError: applied_steps is not a whole number, 0 or more.
        """
        check_count("applied_steps", applied_steps)
        self._applied_steps = applied_steps
        self._seeds.place(applied_steps)
        self._evidence.begin_anew()
        self._apply()
        self.refresh()

    def state_dict(self) -> dict[str, Any]:
        """Counter, phases, last scale seen, seed and early end (ended_at), as plain numbers and strings."""
        return {
            "applied_steps": self._applied_steps,
            "phases": [asdict(phase) for phase in self._phases],
            "last_scale": self._evidence.last_scale,
            "seed": self._seeds.seed,
            "ended_at": self._ended_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where state was saved, also in mid-phase.

        Raises:
            ScheduleError: state is of another kind or has other phases; nothing is changed.
        """
        self._restore(checked_state(state, self._planned))
        self._apply()
        self.refresh()

    def _restore(self, saved: Saved) -> None:
        self._applied_steps, self._evidence.last_scale, self._seeds.seed, self._ended_at, self._phases = saved
        self._seeds.place(self._applied_steps)
        self._evidence.begin_anew()

    def __repr__(self) -> str:
        plan = " -> ".join(f"{phase.steps} {phase.kind}" for phase in self._phases)
        copies = f"; {self._layers.followers} layers of copies follow" if self._layers.followers else ""
        packed = "; packs per step" if self.packed_weights is not None else ""
        return f"{type(self).__name__}({plan}; {self._applied_steps} applied, now {self.phase}{packed}{copies})"

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which come with their model: in the same phase, observing that model's optimizers."""
        group = None if self._group is not False else False  # a process group cannot be copied
        other = {"_evidence": self._evidence.last_scale, "_group": group, "_seeds": self._seeds.seed}
        return {**self.__dict__, **other}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()
        self._evidence.last_scale = state["_evidence"]
        self._seeds = Seeds(self._layers.by_name, state["_seeds"], self._group)
        self._seeds.place(self._applied_steps)

    def _check_layers(self) -> None:
        """Check the layers at the first step, and if the coming step ends a phase."""
        if not self._checked_once:
            agree(attempt(self._look), self._group)  # on every rank, so that none waits for one that raises
        elif kind_at(self._phases, self._applied_steps + 1) != self.phase:
            self._layers.look()
        self._checked_once = True

    def _look(self) -> int:
        """Check the layers; what ranks compare: one that resumed elsewhere would be in another phase."""
        self._layers.look()
        return digest((self._phases, self._applied_steps), {})

    def _advance(self) -> None:
        self._applied_steps += 1
        self._seeds.advance(self._applied_steps)
        self._apply()

    def _apply(self) -> None:
        sparse = self.phase == "sparse"
        if sparse and self._layers.awaits_calls and not self._was_sparse:
            self._evidence.watch_gradients(True)
        self._was_sparse = sparse
        self._layers.switch(sparse)
