"""Compressed all-gathers on four processes: replicas, meshes with two axes, and checkpoints for two processes."""

import pytest
import torch
import torch.multiprocessing

from tests.conftest import EVERY_CASE
from tests.distributed.test_ddp_fsdp import assert_equal, loopback
from tests.integrations import fsdp_four_ranks, fsdp_ranks

pytestmark = pytest.mark.skipif(not EVERY_CASE, reason="starts six processes; SEMISPARSE_EVERY_CASE=1 runs it")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What each process saw, by the number of processes."""
    folder, found = tmp_path_factory.mktemp("four"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", loopback())
        for world in (4, 2):
            torch.multiprocessing.spawn(fsdp_four_ranks.worker, args=(world, str(folder)), nprocs=world)
            files = [folder / f"{rank}of{world}.pt" for rank in range(world)]
            found[world] = [torch.load(file, weights_only=True) for file in files]
    return found


def test_replicas_train_as_with_whole_gathers(records: dict[int, list[dict]]) -> None:
    for record in records[4]:
        for compressed, whole in record["replicated"]:
            assert_equal(compressed, whole)


def test_tensor_parallelism_below_fsdp_computes_what_one_process_does(records: dict[int, list[dict]]) -> None:
    for record in records[4]:
        ours, alone = record["two ways"]
        torch.testing.assert_close(ours, alone)


def test_what_four_ranks_cannot_compress_is_an_error_on_each(records: dict[int, list[dict]]) -> None:
    for record in records[4]:
        assert record["ended"] == ["LayerRefusedError", "ConfigError"]


def test_uneven_shards_train_as_one_process_and_are_refused_where_gathers_are_compressed(
    records: dict[int, list[dict]],
) -> None:
    alone = fsdp_ranks.steps(fsdp_ranks.net(), 0)[: fsdp_ranks.STEPS]
    for record in records[4][:3]:
        losses, end = record["uneven"]
        assert end == "ShapeError"
        for one, other in zip(losses, alone, strict=True):
            torch.testing.assert_close(one, other)


def test_two_ranks_load_what_four_saved(records: dict[int, list[dict]]) -> None:
    expected = records[4][0]["output"]
    for record in (*records[4], *records[2]):
        assert torch.equal(record["output"], expected)


def test_two_ranks_go_on_in_mid_phase_where_four_saved_with_whole_gathers(records: dict[int, list[dict]]) -> None:
    for rank, record in enumerate(records[2]):
        expected = records[4][rank]["mid-phase"]  # which had the same inputs
        assert len(expected) == 6
        for one, other in zip(record["mid-phase"], expected, strict=True):
            torch.testing.assert_close(one, other)
