"""torchtitan's own program and Trainer with 2:4 layers: phases, and runs that go on from its own checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from tests.conftest import EVERY_CASE
from tests.distributed.test_ddp_fsdp import loopback
from tests.integrations import torchtitan_ranks
from tests.integrations.test_hosts_on_ranks import free_port

pytest.importorskip("torchtitan", reason="make test installs it")
pytest.importorskip("torchdata", reason="make test installs it")

pytestmark = [
    pytest.mark.skipif(not EVERY_CASE, reason="starts many processes; SEMISPARSE_EVERY_CASE=1 runs it"),
    pytest.mark.filterwarnings("ignore"),  # the host's own, which change with its versions
]
OLD = not hasattr(torch.distributed, "set_timeout")  # older than torchtitan 0.3 is made for
STEPS, SAVED = 6, 2
SEEN = ["sparse"] * 4 + ["dense"] * 2
Found = dict[str, Any]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback())


def trained(folder: Path, world: int, *options: str) -> list[Found]:
    """What each rank found in a run that saves in folder, or goes on from what is saved there."""
    arguments = (world, free_port(), str(folder), ["--training.steps", str(STEPS), *options])
    torch.multiprocessing.spawn(torchtitan_ranks.worker, args=arguments, nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def gone_on(folder: Path, world: int, *options: str) -> list[Found]:
    """What each rank found in a run that began with a checkpoint of the one in folder/whole."""
    saved = Path("checkpoint", f"step-{SAVED}")
    shutil.copytree(folder / "whole" / saved, folder / "resumed" / saved)
    return trained(folder / "resumed", world, *options)


def assert_the_end_of(whole: Found, resumed: Found) -> None:
    """Losses and weights are the same, bit for bit."""
    assert list(whole["losses"]) == list(range(1, STEPS + 1))
    assert resumed["losses"] == {step: loss for step, loss in whole["losses"].items() if step > SAVED}
    assert all(torch.equal(*both) for both in zip(whole["weights"], resumed["weights"], strict=True))


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, ()),
        (2, ("--parallelism.spmd_backend", "partial_dtensor")),
        (2, ("--parallelism.spmd_backend", "full_dtensor")),
        pytest.param(2, (), marks=pytest.mark.skipif(OLD, reason="FSDP2 of torch 2.13 refuses the default backend")),
    ],
    ids=["one", "two", "two-full-dtensor", "two-default"],
)
def test_a_run_goes_on_from_a_checkpoint_in_mid_phase_bit_for_bit(
    world: int, options: tuple[str, ...], tmp_path: Path
) -> None:
    whole = trained(tmp_path / "whole", world, *options)
    resumed = gone_on(tmp_path, world, *options)
    for one, other in zip(whole, resumed, strict=True):
        assert one["phases"] == SEEN and other["phases"] == SEEN[SAVED:]
        assert_the_end_of(one, other)


@pytest.mark.skipif(OLD, reason="schedules of torch 2.13 take other micro-batches than torchtitan gives them")
@pytest.mark.usefixtures("loop")
def test_the_stages_of_a_pipeline_change_phase_and_go_on_together(tmp_path: Path) -> None:
    options = ("--parallelism.pipeline_parallel_degree", "2", "--parallelism.pipeline_parallel_schedule", "1F1B")
    options += ("--training.disable_cuda_graphs",)  # torchtitan wants it for pipelines, also where it records none
    whole = trained(tmp_path / "whole", 2, *options)
    resumed = gone_on(tmp_path, 2, *options)
    for one, other in zip(whole, resumed, strict=True):
        # Two micro-batches a step, and a forward before the first by which PyTorch learns the shapes.
        assert one["phases"] == ["sparse"] + [phase for phase in SEEN for _ in range(2)]
        assert other["phases"] == ["sparse"] + [phase for phase in SEEN[SAVED:] for _ in range(2)]
        assert_the_end_of(one, other)
    assert min(whole[1]["losses"].values()) > 0 > max(whole[0]["losses"].values())  # the last stage has the loss


@pytest.mark.usefixtures("loop")
def test_accumulated_batches_are_one_step_and_compiled_blocks_change_phase(tmp_path: Path) -> None:
    accumulated = ("--training.global_batch_size", "4")
    (eager,) = trained(tmp_path / "eager", 1, *accumulated)
    compiling = ("--compile.enable", "--compile.components", "model")
    (compiled,) = trained(tmp_path / "compiled", 1, *accumulated, *compiling)
    assert eager["phases"] == compiled["phases"] == [phase for phase in SEEN for _ in range(2)]
    assert (eager["graphs"], compiled["graphs"]) == (0, 2)  # all six blocks share one for each kind of phase
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-3)  # bf16, summed in another order
