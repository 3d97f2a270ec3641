"""The trainers of other packages with FSDP2 on two gloo processes, against one process, and resumed in mid-phase."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from tests.conftest import EVERY_CASE
from tests.distributed.test_ddp_fsdp import loopback
from tests.integrations import hosts_fsdp
from tests.integrations.hosts_fsdp import HOSTS, SAVED, SAVING, SEEN, WORLD, Found
from tests.integrations.test_hosts_on_ranks import free_port

pytestmark = [
    pytest.mark.skipif(not EVERY_CASE, reason="starts many processes; SEMISPARSE_EVERY_CASE=1 runs it"),
    pytest.mark.filterwarnings("ignore"),  # the hosts' own, which change with their versions
]


def runs(host: str, folder: Path, monkeypatch: pytest.MonkeyPatch, resume: bool = False) -> list[Found]:
    """What both ranks found."""
    pytest.importorskip(host, reason="make test installs it")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback())
    arguments = (host, free_port(), str(folder), resume)
    torch.multiprocessing.spawn(hosts_fsdp.worker, args=arguments, nprocs=WORLD)
    ends = [f"{rank}{'-resumed' * resume}.pt" for rank in range(WORLD)]
    return [torch.load(folder / f"{host}{end}", weights_only=True) for end in ends]


@pytest.mark.parametrize("host", HOSTS)
def test_sharded_training_is_that_of_one_process_and_resumes_bit_for_bit(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = runs(host, tmp_path, monkeypatch)
    alone = HOSTS[host](tmp_path / "alone", 1)
    assert alone["seen"] == SEEN and not alone["sharded"]
    for found in ranks:
        assert found["seen"] == SEEN and found["sharded"] and not found["sparse"]
        for one, other in zip(found["weights"], alone["weights"], strict=True):
            torch.testing.assert_close(one, other)
    if host in SAVING:
        for whole, resumed in zip(ranks, runs(host, tmp_path, monkeypatch, resume=True), strict=True):
            assert resumed["seen"] == SEEN[SAVED:] and resumed["sharded"] and not resumed["sparse"]
            assert all(torch.equal(*both) for both in zip(whole["weights"], resumed["weights"], strict=True))
