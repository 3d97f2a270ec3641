"""Compressed all-gathers of FSDP2 on two gloo processes, which run once for the whole file, against one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
import torch.multiprocessing

from tests.distributed.test_ddp_fsdp import assert_equal, loopback
from tests.distributed.training import train
from tests.integrations import fsdp_ranks
from tests.integrations.fsdp_attempts import ENDS
from tests.integrations.fsdp_ranks import MIXED, TRAININGS, WORLD

SIZE = 32 * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes leave what they saw and saved."""
    return tmp_path_factory.mktemp("gathers")


@pytest.fixture(scope="module")
def records(folder: Path) -> list[dict]:
    """What each process saw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", loopback())
        torch.multiprocessing.spawn(fsdp_ranks.worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("scenario", TRAININGS, ids=lambda scenario: scenario.name)
def test_masks_losses_and_weights_equal_those_of_one_process(records: list[dict], scenario) -> None:
    alone = train(scenario, None)
    for rank, record in enumerate(records):
        ours = record[scenario.name]
        assert_equal(ours["losses"], alone["losses"][rank::WORLD])
        assert_equal(ours["weights"], alone["weights"])
        assert_equal(ours["masks"], [mask for i, mask in enumerate(alone["masks"]) if i // 2 % WORLD == rank])


@pytest.mark.parametrize("name", [name for name, config in MIXED.items() if config.precision is None])
def test_masks_come_from_fp32_masters_where_bf16_is_gathered(records: list[dict], name: str) -> None:
    for record, alone in zip(records, fsdp_ranks.mixed_alone(name), strict=True):
        assert_equal(record[f"mixed {name}"], alone)


@pytest.mark.parametrize("name", fsdp_ranks.WHOLE)
def test_masks_come_from_the_rounded_weight_where_bf16_is_gathered_whole(records: list[dict], name: str) -> None:
    for record, alone in zip(records, fsdp_ranks.mixed_alone(name, compress=False), strict=True):
        assert_equal(record[f"mixed {name}, whole"], alone)


def test_fp8_from_fp32_masters_gathered_in_bf16_is_the_same_on_all_ranks(records: list[dict]) -> None:
    first, second = (record["mixed fp8"][fsdp_ranks.STEPS :] for record in records)
    assert_equal(first, second)
    assert all(weight.isfinite().all() for weight in first)


@pytest.mark.parametrize(("name", "share"), [("bf16", 9 / 16), ("fp8", 5 / 16)])
def test_only_the_all_gather_shrinks_and_only_in_sparse_phases(records: list[dict], name: str, share: float) -> None:
    shard = SIZE * 2 // WORLD
    for record in records:
        seen = record["counted"]
        sparse, dense = seen[f"{name} sparse"], seen[f"{name} dense"]
        # Both layers, for the forward and again for the backward.
        assert dense["allgather_base"] == [shard] * 4
        assert sparse["allgather_base"] == [shard * share] * 4
        assert dense["reduce_scatter_base"] == sparse["reduce_scatter_base"] == [SIZE * 4] * 2
        # In fp8 one reduction for both layers finds the scales.
        assert sparse.get("allreduce") == ([2 * 4] if name == "fp8" else None)
        assert "allreduce" not in dense
        assert seen[f"{name} report"] == (("0", "1"), 2 * SIZE * 2, 2 * SIZE * 2 * share)


def test_sampled_gradients_are_those_of_whole_gathers(records: list[dict]) -> None:
    for record in records:
        assert_equal(record["sampled"]["compressed"], record["sampled"]["whole"])


def test_checkpointed_and_compiled_layers_train_as_plain_ones(records: list[dict]) -> None:
    for record in records:
        (plain, *others), graphs = record["composed"]
        assert len(others) == 2
        for other in others:
            assert_equal(other, plain)
        # One per phase for the first layer, whose input needs no gradient, and for the second; none for a phase again.
        assert graphs == 4


def test_compiled_checkpointed_layers_train_as_plain_ones_with_whole_gathers(records: list[dict]) -> None:
    for record in records:
        (plain, *others), graphs = record["composed_whole"]
        assert len(others) == 2
        for other in others:
            assert_equal(other, plain)
        assert graphs == 4  # one per phase, for each of both ways


def test_recipes_whose_masks_follow_the_weights_train_as_with_whole_gathers(records: list[dict]) -> None:
    for record in records:
        assert list(record["recipe_runs"]) == ["safest", "fastest", "dinov2"]
        for compressed, whole in record["recipe_runs"].values():
            assert_equal(compressed, whole)


def test_micro_batches_after_an_evaluation_train_as_with_whole_gathers(records: list[dict]) -> None:
    for record in records:
        assert len(record["accumulated"]) == 4
        for compressed, whole in record["accumulated"].values():
            assert_equal(compressed, whole)


def test_weights_that_come_after_the_call_are_gathered_compressed(records: list[dict]) -> None:
    for record in records:
        ours, alone, seen = record["meta"]
        assert torch.equal(ours, alone)
        assert seen["allgather_base"] == [SIZE // WORLD * 17 // 8] * 2  # fp32: 2 bytes and 1 bit per entry


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_loads_in_one_process(records: list[dict], folder: Path) -> None:
    model = fsdp_ranks.net()
    state = {"model": model.state_dict()}
    torch.distributed.checkpoint.load(state, checkpoint_id=folder / "checkpoint", no_dist=True)
    for rank, record in enumerate(records):
        assert torch.equal(model(fsdp_ranks.inputs(9)[rank]), record["saved"])


def test_checkpoints_are_plain_and_a_loaded_model_gathers_compressed(records: list[dict]) -> None:
    for record in records:
        seen = record["checkpoints"]
        assert seen["plain"] and seen["whole"] and seen["same"]
        assert seen["bytes"]["allgather_base"] == [SIZE // WORLD * 17 // 8] * 2  # fp32: 2 bytes and 1 bit per entry


def test_a_phase_that_changes_while_weights_are_gathered_is_seen(records: list[dict]) -> None:
    assert all(record["phase_after_evaluation"] for record in records)


def test_the_mask_that_travels_is_used_not_one_of_the_rounded_weight(records: list[dict]) -> None:
    for record in records:
        ours, expected = record["small_beside_large"]
        assert torch.equal(ours, expected)
        assert expected.count_nonzero() == 2 * (SIZE // 16)


def test_the_scale_of_fp8_is_that_of_the_whole_weight(records: list[dict]) -> None:
    for record in records:
        assert torch.equal(*record["scales"])


def test_what_is_not_finite_on_one_rank_shows_on_all(records: list[dict]) -> None:
    for record in records:
        assert not any(record["not_finite"])


@pytest.mark.parametrize("attempt", ENDS, ids=lambda attempt: attempt.__name__)
def test_every_rank_ends_in_its_error(records: list[dict], attempt) -> None:
    assert tuple(record["ended"][attempt.__name__] for record in records) == ENDS[attempt]
