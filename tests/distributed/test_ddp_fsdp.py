"""DDP, FSDP2, pipelines and tensor parallelism on two gloo processes against one: the same numbers, bit for bit.

The processes run once for the whole file. fp64, and fp32 with precision="fp8"; the single process accumulates the two
half batches, which is the same arithmetic as averaging gradients over two processes.
"""

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from benchmarks import scaling, scaling_tables
from tests.conftest import EVERY_CASE
from tests.distributed import pipeline, tensor_parallel, training
from tests.distributed.training import PHASES, SCENARIOS, STEPS, WORLD, Scenario

ALL = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes leave what they saw and saved."""
    return tmp_path_factory.mktemp("gloo")


@pytest.fixture(scope="module")
def records(folder: Path) -> list[dict]:
    """What each process saw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", loopback())
        torch.multiprocessing.spawn(training.worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    """What one process computes, for each operand and optimizer."""
    return {f"{s.operand}-{s.optimizer}": training.train(s, None) for s in SCENARIOS if s.wrapper == "ddp"}


def loopback() -> str:
    """Name of the loopback interface."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def expected(alone: dict[str, dict], scenario: Scenario) -> dict:
    return alone[f"{scenario.operand}-{scenario.optimizer}"]


def assert_equal(ours: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    assert len(ours) == len(others)
    for number, (one, other) in enumerate(zip(ours, others, strict=True)):
        assert torch.equal(one, other), f"number {number} differs"


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.operand != "fp8"], ids=lambda scenario: scenario.name)
def test_masks_equal_those_of_one_process(records: list[dict], alone: dict, scenario: Scenario) -> None:
    sparse_steps = sum(phase.steps for phase in PHASES if phase.kind == "sparse")
    single = expected(alone, scenario)["masks"]
    assert len(single) == 2 * WORLD * sparse_steps  # two layers; in a dense phase nothing is pruned
    for rank, record in enumerate(records):
        ours = record[scenario.name]["masks"]
        assert len(ours) == 2 * sparse_steps
        # One process runs the shards one after the other, two layers each.
        assert_equal(ours, [mask for i, mask in enumerate(single) if i // 2 % WORLD == rank])


@ALL
def test_losses_equal_those_of_one_process(records: list[dict], alone: dict, scenario: Scenario) -> None:
    single = expected(alone, scenario)["losses"]
    assert len(single) == WORLD * STEPS
    for rank, record in enumerate(records):
        assert_equal(record[scenario.name]["losses"], single[rank::WORLD])


@ALL
def test_weights_after_every_step_equal_those_of_one_process(
    records: list[dict], alone: dict, scenario: Scenario
) -> None:
    for record in records:
        assert_equal(record[scenario.name]["weights"], expected(alone, scenario)["weights"])


def test_masks_move_during_these_runs(alone: dict) -> None:
    for name, record in alone.items():
        if "fp8" in name:  # packed at once, without an op that prunes
            continue
        masks = record["masks"][::2]
        assert any(not torch.equal(masks[0], mask) for mask in masks), name


def test_densify_on_a_sharded_root(records: list[dict]) -> None:
    for record in records:
        result = record["densify"]
        assert result["before"] == ["SemiSparseLinear", "SemiSparseLinear"]
        assert result["swapped"] == ("0", "2")
        assert result["types"] == ["Linear", "Linear"]
        assert result["same"]


def test_masked_weights_of_a_sharded_model_are_refused_with_the_way_out(records: list[dict]) -> None:
    for record in records:
        assert "sharded DTensor" in record["densify"]["masked"]
        assert "full state_dict" in record["densify"]["masked"]


def test_layers_that_fsdp_wrapped_themselves_are_refused_and_stay(records: list[dict]) -> None:
    for record in records:
        assert "wrapper around a semi-sparse layer" in record["densify"]["wrapped"]
        assert record["densify"]["still"] == ["FSDPSemiSparseLinear", "FSDPSemiSparseLinear"]


def test_a_checkpoint_in_mid_phase_continues_bit_for_bit(records: list[dict]) -> None:
    for record in records:
        assert_equal(record["checkpoints"]["resumed"], record["checkpoints"]["saved"])


def test_a_full_state_dict_is_that_of_the_dense_model(records: list[dict]) -> None:
    (first, empty), (_, other_empty) = (record["checkpoints"]["full state"] for record in records)
    assert first and not empty and other_empty


def test_a_step_that_one_shard_makes_the_scaler_skip_counts_on_no_rank(records: list[dict]) -> None:
    for record in records:
        assert record["checkpoints"]["overflow"] == [1, 1, 2]


@pytest.mark.parametrize("name", pipeline.CONFIGS)
@pytest.mark.parametrize("order", pipeline.ORDERS)
def test_stages_of_a_pipeline_train_as_one_process(records: list[dict], order: str, name: str) -> None:
    losses, weights = pipeline.alone(name)
    assert_equal(records[1]["pipeline"][f"{order} {name}"][0], losses)
    for record, expected in zip(records, weights, strict=True):
        assert_equal(record["pipeline"][f"{order} {name}"][1], expected)


def test_stages_that_a_schedule_compares_are_refused_with_the_way_out(records: list[dict]) -> None:
    for record in records:
        message = record["pipeline"]["compared"]
        assert "different parts of a model, pass the data-parallel group as process_group, or False" in message


@pytest.mark.parametrize("name", tensor_parallel.CONFIGS)
@pytest.mark.filterwarnings("ignore::semisparse.TokenMixingWarning")
def test_tensor_parallel_layers_give_the_output_and_gradients_of_one_process(records: list[dict], name: str) -> None:
    alone = tensor_parallel.once(tensor_parallel.net(tensor_parallel.CONFIGS[name]))
    for record in records:
        assert_equal(record["tensor_parallel"]["once"][name], alone)


def test_compiled_tensor_parallel_layers_do_not_break_the_graph(records: list[dict]) -> None:
    for record in records:
        seen, breaks = record["tensor_parallel"]["compiled"]
        assert_equal(seen, record["tensor_parallel"]["once"]["transposable"])
        assert breaks == 0


@pytest.mark.parametrize("style", ["ColwiseParallel", "RowwiseParallel"])
@pytest.mark.parametrize("name", tensor_parallel.EXACT)
def test_layers_swapped_after_parallelize_module_compute_in_fp8_and_sample(
    records: list[dict], name: str, style: str
) -> None:
    y, grad_x, grad_bias, grad_weight = tensor_parallel.layer(None, tensor_parallel.EXACT[name])
    parts = [record["tensor_parallel"]["layers"][f"{style} {name}"] for record in records]
    if style == "ColwiseParallel":
        assert torch.equal(torch.cat([part[0] for part in parts], dim=1), y)
        assert all(torch.equal(part[1], grad_x) for part in parts)
    else:
        assert all(torch.equal(part[0], y) for part in parts)
        assert torch.equal(sum(part[1] for part in parts), grad_x)
    for part in parts:
        assert torch.equal(part[2], grad_bias)
        assert torch.equal(part[3], parts[0][3])
        assert name == "mvue" or torch.equal(part[3], grad_weight)  # samples are other ones on each rank


def test_tensor_parallel_layers_follow_a_schedule(records: list[dict]) -> None:
    alone = tensor_parallel.steps(tensor_parallel.net(tensor_parallel.CONFIGS["transposable"]))
    for record in records:
        assert_equal(record["tensor_parallel"]["steps"][:1], alone[:1])  # later weights are not integers
        for one, other in zip(record["tensor_parallel"]["steps"], alone, strict=True):
            torch.testing.assert_close(one, other)


def test_parts_without_whole_tiles_and_plain_inputs_are_errors_on_every_rank(records: list[dict]) -> None:
    for record in records:
        seen = record["tensor_parallel"]
        assert (seen["straddled"], seen["plain input"], seen["fits"]) == ("ShapeError", "TensorError", "")


def test_the_benchmark_of_scaling_computes_the_same_in_every_layout(records: list[dict], folder: Path) -> None:
    result = json.loads((folder / "scaling-2.json").read_text())
    assert result["toy"] and result["ranks"] == 2
    found = {(one["precision"], one["layout"]): one for one in result["variants"]}
    assert list(found) == [variant for variant in scaling.variants(2) if EVERY_CASE or variant[0] == "2:4"]
    for (precision, layout), one in found.items():
        assert one["losses"][-1] < one["losses"][0]
        if layout in (scaling.FSDP, scaling.COMPRESSED):
            assert one["losses"] == found[precision, scaling.DDP]["losses"]
    whole, compressed = (found["2:4", layout]["bytes_per_step"] for layout in (scaling.FSDP, scaling.COMPRESSED))
    assert compressed["allgather_base"] < whole["allgather_base"]
    assert compressed["reduce_scatter_base"] == whole["reduce_scatter_base"]
    assert len(scaling_tables.table([result]).rows) == len(found)
