"""Ranks that hold different layers, settings or masks are told so, all of them, and none is left waiting."""

import pytest
import torch
import torch.multiprocessing

from semisparse.schedule.ranks import digest
from tests.distributed import ranks
from tests.distributed.ranks import SCENARIOS, WORLD
from tests.distributed.test_ddp_fsdp import loopback


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Scenario -> the error it ended in, on each rank. A rank that waits for ever fails after its 20 s."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", loopback())
        torch.multiprocessing.spawn(ranks.worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_rank_ends_in_its_error(ended: list[dict[str, str]], scenario) -> None:
    assert tuple(record[scenario.__name__] for record in ended) == SCENARIOS[scenario]


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_any_change_of_one_element_changes_the_digest(dtype: torch.dtype) -> None:
    tensor = torch.arange(256).reshape(16, 16).to(dtype)
    seen = {digest("", {"a": tensor})}
    for place in range(256):
        other = tensor.clone()
        other.view(-1)[place] += 1
        seen.add(digest("", {"a": other}))
    seen.add(digest("", {"a": tensor.flip(0)}))
    seen.add(digest("", {"b": tensor}))
    seen.add(digest("x", {"a": tensor}))
    assert len(seen) == 260


def test_the_digest_is_the_same_for_any_strides() -> None:
    tensor = torch.randint(-(2**15), 2**15, (16, 32), dtype=torch.int16)
    assert digest("", {"a": tensor}) == digest("", {"a": tensor.t().contiguous().t()})
