"""The decision part of tuning, against made-up candidates and a clock that they advance."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch

from semisparse.errors import EngineError
from semisparse.gemm.autotune.selection import LEAP, NOT_REACHED, SECONDS, Selection


@dataclass
class MadeUp:
    """Candidates with known times (us); None is dense. check_s: how long checking one takes."""

    times: Mapping[int | None, float]
    faults: Mapping[int, str] = field(default_factory=dict)
    raises: Mapping[int | None, Exception] = field(default_factory=dict)
    raises_when_timed: Mapping[int | None, Exception] = field(default_factory=dict)
    check_s: float = 1e-3
    now: float = 0.0
    checked: list[int] = field(default_factory=list)
    timed: list[tuple[int | None, int]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def fault(self, algorithm):
        self.checked.append(algorithm)
        self.now += self.check_s
        if algorithm in self.raises:
            raise self.raises[algorithm]
        return self.faults.get(algorithm)

    def time(self, algorithm, repeats):
        if algorithm in self.raises_when_timed:
            raise self.raises_when_timed[algorithm]
        self.timed.append((algorithm, repeats))
        self.now += self.times[algorithm] * repeats * 1e-6
        return self.times[algorithm]

    def run(self, seconds=SECONDS):
        candidates = [name for name in self.times if name is not None]
        return Selection(self, self.clock, seconds).run(candidates, dense=None in self.times)


def test_the_fastest_wins_and_both_times_are_reported():
    choice = MadeUp({0: 150.0, 1: 120.0, 2: 141.0, None: 180.0}).run()
    assert (choice.algorithm, choice.sparse_algorithm) == (1, 1)
    assert (choice.sparse_us, choice.dense_us, choice.source) == (120.0, 180.0, "tuned")
    assert (choice.rejected, choice.note) == ((), "")


@pytest.mark.parametrize("dense", [100.0, 120.0])
def test_dense_wins_when_it_is_faster_or_equal_and_the_best_algorithm_is_still_known(dense):
    choice = MadeUp({0: 150.0, 1: 120.0, None: dense}).run()
    assert (choice.algorithm, choice.sparse_algorithm, choice.dense_us) == (None, 1, dense)


def test_without_a_dense_alternative_sparse_is_chosen():
    choice = MadeUp({0: 150.0, 1: 120.0}).run()
    assert (choice.algorithm, choice.dense_us) == (1, None)


def test_a_wrong_algorithm_is_never_chosen_however_fast_and_the_reason_is_kept():
    made_up = MadeUp({0: 150.0, 1: 1.0, 2: 140.0}, faults={1: "wrong: other bits in run 2"})
    choice = made_up.run()
    assert choice.algorithm == 2
    assert choice.rejected == ((1, "wrong: other bits in run 2"),)
    assert choice.sparse_us == 140.0


def test_a_failing_algorithm_is_dropped_when_checked_and_when_timed():
    made_up = MadeUp(
        {0: 150.0, 1: 1.0, 2: 2.0},
        raises={1: EngineError("refused")},
        raises_when_timed={2: EngineError("failed later")},
    )
    choice = made_up.run()
    assert choice.algorithm == 0
    assert dict(choice.rejected) == {1: "EngineError: refused", 2: "EngineError: failed later"}
    assert choice.note == ""


@pytest.mark.parametrize("stage", ["raises", "raises_when_timed"])
def test_an_algorithm_that_runs_out_of_memory_is_dropped_and_noted(stage):
    choice = MadeUp({0: 150.0, 1: 1.0}, **{stage: {1: torch.OutOfMemoryError("CUDA out of memory")}}).run()
    assert choice.algorithm == 0
    assert dict(choice.rejected) == {1: "OutOfMemoryError: CUDA out of memory"}
    assert "algorithm 1 could not be timed" in choice.note


def test_a_dense_alternative_that_runs_out_of_memory_is_dropped_and_noted():
    error = torch.OutOfMemoryError("CUDA out of memory")
    choice = MadeUp({0: 150.0, None: 1.0}, raises_when_timed={None: error}).run()
    assert (choice.algorithm, choice.dense_us) == (0, None)
    assert "masked dense could not be timed" in choice.note


def test_when_every_algorithm_is_wrong_dense_is_chosen():
    choice = MadeUp({0: 1.0, 1: 1.0, None: 90.0}, faults={0: "wrong", 1: "wrong"}).run()
    assert (choice.algorithm, choice.sparse_algorithm, choice.sparse_us, choice.dense_us) == (None, None, None, 90.0)
    assert len(choice.rejected) == 2


@pytest.mark.parametrize("error", [RuntimeError("illegal memory access"), KeyboardInterrupt()])
def test_any_other_error_is_not_swallowed(error):
    with pytest.raises(type(error)):
        MadeUp({0: 1.0, 1: 1.0}, raises={1: error}).run()


def test_the_best_are_timed_in_turns_with_dense():
    made_up = MadeUp({algorithm: 100.0 + algorithm for algorithm in range(21)} | {None: 110.0})
    made_up.run()
    turns = [algorithm for algorithm, _ in made_up.timed[-20:]]
    assert turns == [0, 1, 2, None] * 5


def test_a_slow_algorithm_is_measured_only_briefly_and_never_checked():
    made_up = MadeUp({0: 100.0, 1: 1_000.0, 2: 101.0, 3: 102.0})
    made_up.run()
    assert [repeats for algorithm, repeats in made_up.timed if algorithm == 1] == [1, 1]
    assert made_up.checked == [0, 2, 3]


def test_the_first_launch_which_loads_the_kernel_does_not_count():
    class Loading(MadeUp):
        def time(self, algorithm, repeats):
            first = algorithm not in {name for name, _ in self.timed}
            return super().time(algorithm, repeats) + 5_000 * first

    choice = Loading({0: 120.0, 1: 100.0, 2: 130.0, 3: 90.0}).run()
    assert (choice.algorithm, choice.sparse_us) == (3, 90.0)


@pytest.mark.parametrize("scale", [1.0, 100.0, 2_000.0, 20_000.0])
def test_the_time_limit_holds_for_small_and_large_problems(scale):
    """Beyond the limit at most what was begun is finished: one batch of each finalist."""
    made_up = MadeUp({algorithm: scale + algorithm for algorithm in range(21)} | {None: 1.2 * scale})
    made_up.check_s = 6 * scale * 1e-6
    choice = made_up.run()
    assert choice.sparse_algorithm is not None
    assert made_up.now <= SECONDS + 4 * 4 * 1.2 * scale * 1e-6 + 0.01


def test_what_is_not_reached_is_said():
    made_up = MadeUp({0: 1e5, 1: 9e4, 2: 8e4, 3: 7e4})
    choice = made_up.run()
    assert choice.sparse_algorithm is not None
    assert NOT_REACHED in dict(choice.rejected).values()


def test_one_that_is_right_is_looked_for_beyond_the_limit():
    made_up = MadeUp({0: 100.0, 1: 101.0, 2: 102.0}, faults={0: "wrong", 1: "wrong"}, check_s=0.4)
    choice = made_up.run()
    assert (choice.sparse_algorithm, made_up.checked) == (2, [0, 1, 2])


def test_a_noisy_finalist_is_judged_by_its_median():
    class Noisy(MadeUp):
        """Two of the five batches in which algorithm 0 meets the other one are disturbed."""

        def time(self, algorithm, repeats):
            measured = super().time(algorithm, repeats)
            batches = [entry for entry in self.timed if entry[0] == 0 and entry[1] > 1]
            return measured * (50 if algorithm == 0 and repeats > 1 and len(batches) in (3, 5) else 1)

    choice = Noisy({0: 100.0, 1: 110.0}).run()
    assert (choice.algorithm, choice.sparse_us) == (0, 100.0)


@pytest.mark.parametrize(
    ("once", "screen", "final"), [(1.0, 30, 100), (100.0, 20, 100), (500.0, 4, 20), (5_000.0, 3, 3), (20_000.0, 3, 3)]
)
def test_a_batch_lasts_long_enough_to_be_measured_and_no_longer(once, screen, final):
    """2 and 10 ms, but 3 to 30 and 3 to 100 calls."""
    made_up = MadeUp({0: once})
    made_up.run()
    assert made_up.timed[:3] == [(0, 1), (0, 1), (0, screen)]
    assert made_up.timed[3:5] == [(0, 1), (0, final)]


@pytest.mark.parametrize(("leap", "noted"), [(LEAP - 1, False), (LEAP + 1, True), (-3600.0, False)])
def test_a_choice_that_a_leap_of_the_clock_cut_short_has_a_note(leap, noted):
    class Leaping(MadeUp):
        def time(self, algorithm, repeats):
            if len(self.timed) == 3:  # while the second candidate is timed
                self.now += leap
            return super().time(algorithm, repeats)

    choice = Leaping({0: 150.0, 1: 120.0, 2: 141.0}).run()
    assert (choice.algorithm, dict(choice.rejected)) == (1, {2: NOT_REACHED} if leap > 0 else {})
    assert ("the clock went" in choice.note) is noted
