"""The launcher starts the kernel that fits the addresses, on the device and stream at hand, on a simulated CUDA."""

import pytest
import torch

from semisparse.kernels.launcher import Launcher


class Kernel:
    """Triton's side: kernel[grid](...) compiles for the addresses, compiled[grid](...) starts what it compiled."""

    def __init__(self, cuda):
        self.cuda, self.log = cuda, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.log.append(("compile", grid, arguments, options, self.cuda.device))
            return self.compiled(len(self.log))

        return launch

    def compiled(self, number):
        kernel = self

        class Compiled:
            def __getitem__(self, grid):
                def start(*arguments, stream):
                    kernel.log.append((f"start {number}", grid, arguments, stream, kernel.cuda.device))

                return start

        return Compiled()


class Cuda:
    device = 0

    def exchange(self, index):
        previous, self.device = self.device, index
        return previous


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda()
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: made.device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_exchangeDevice", made.exchange, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    return made


def at(offset):
    """A tensor whose address is a multiple of 16 plus offset."""
    memory = torch.zeros(64, dtype=torch.uint8)
    return memory[(offset - memory.data_ptr()) % 16 :]


def made(cuda):
    kernel = Kernel(cuda)
    return kernel, Launcher(kernel, (2, 3, 1), (5, 7), ("C", True), num_warps=4, maxnreg=80)


def kinds(kernel):
    return [entry[0] for entry in kernel.log]


def test_a_repeated_launch_starts_what_was_compiled(cuda):
    kernel, launcher = made(cuda)
    first, second = (at(0), None, at(0)), (at(0), None, at(0))
    launcher(0, *first)
    launcher(0, *second)
    launcher(0, *first)
    assert kinds(kernel) == ["compile", "start 1", "start 1"]
    assert kernel.log[0] == ("compile", (2, 3, 1), (*first, 5, 7, "C", True), {"num_warps": 4, "maxnreg": 80}, 0)
    assert kernel.log[1] == ("start 1", (2, 3, 1), (*second, 5, 7, "C", True), 70, 0)


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_addresses_that_are_aligned_otherwise_never_meet_the_kernel_for_aligned_ones(cuda, offset, place):
    """They would read 16 bytes at once where that is an error, or the wrong bytes."""
    kernel, launcher = made(cuda)
    aligned = [at(0), at(0), at(0)]
    unaligned = [at(offset) if number == place else at(0) for number in range(3)]
    launcher(0, *unaligned)
    launcher(0, *aligned)
    launcher(0, *unaligned)
    launcher(0, *aligned)
    assert kinds(kernel) == ["compile", "compile", "compile", "start 2"]


def test_every_device_has_a_kernel_and_a_stream_of_its_own_and_the_current_one_stays(cuda):
    kernel, launcher = made(cuda)
    for index in (0, 1, 1, 0):
        launcher(index, at(0))
        assert cuda.device == 0
    assert [(entry[0], entry[-1]) for entry in kernel.log] == [
        ("compile", 0),
        ("compile", 1),
        ("start 2", 1),
        ("start 1", 0),
    ]
    assert [entry[3] for entry in kernel.log[2:]] == [71, 70]


def test_a_launch_that_fails_leaves_the_device_as_it_was_and_nothing_behind(cuda):
    kernel, launcher = made(cuda)
    kernel.compiled = lambda number: (_ for _ in ()).throw(RuntimeError("out of resources"))
    with pytest.raises(RuntimeError, match="out of resources"):
        launcher(1, at(0))
    assert cuda.device == 0
    del kernel.compiled
    launcher(1, at(0))
    assert kinds(kernel) == ["compile", "compile"]


def test_on_the_cpu_the_interpreter_gets_every_launch_and_cuda_is_not_asked(cuda, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_getDevice")
    kernel, launcher = made(cuda)
    launcher(-1, at(0))
    launcher(-1, at(0))
    assert kinds(kernel) == ["compile", "compile"]
