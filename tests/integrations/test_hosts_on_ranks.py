"""The trainers of other packages with DistributedDataParallel on two gloo processes, against one process."""

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from tests.conftest import EVERY_CASE
from tests.distributed.test_ddp_fsdp import loopback
from tests.integrations import hosts_ranks
from tests.integrations.hosts_ranks import HOSTS, STEPS, WORLD

pytestmark = [
    pytest.mark.skipif(not EVERY_CASE, reason="starts six processes; SEMISPARSE_EVERY_CASE=1 runs it"),
    pytest.mark.filterwarnings("ignore"),  # the hosts' own, which change with their versions
]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("host", HOSTS)
def test_ranks_train_as_one_process_and_end_with_plain_layers(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(host, reason="make test installs it")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback())
    torch.multiprocessing.spawn(hosts_ranks.worker, args=(host, free_port(), str(tmp_path)), nprocs=WORLD)
    seen, weights, plain = getattr(hosts_ranks, host)(tmp_path, 1)
    assert seen == ["sparse"] * (STEPS // 2) + ["dense"] * (STEPS // 2) and plain
    for rank in range(WORLD):
        (ours, others, ended_plain), world = torch.load(tmp_path / f"{host}{rank}.pt", weights_only=True)
        assert world == WORLD and ours == seen and ended_plain
        for one, other in zip(others, weights, strict=True):
            torch.testing.assert_close(one, other)
