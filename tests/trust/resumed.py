"""C1: a training in a process of its own that saves each step, is killed and resumed: the bits of an uninterrupted one.

python -m tests.trust.resumed FOLDER STEPS              what is killed; it prints a line for each step that is saved
"""

import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from semisparse.files import write_atomically
from semisparse.gemm.autotune.autotuner import VARIABLE
from tests.faults.training import digest
from tests.trust import apart
from tests.trust.convergence import Run, subjects
from tests.trust.machine import Machine
from tests.trust.outcome import Row

STEPS = 60
KILLS = 3
"""Of each training."""

LONGEST = 120.0
"""Seconds that a process may take."""

STATE = "state.pt"
Command = Callable[[Path], Sequence[str]]


def command(folder: Path) -> list[str]:
    """Of the process that trains and keeps its state in a folder."""
    return [sys.executable, "-m", "tests.trust.resumed", str(folder), str(STEPS)]


@dataclass
class Trainings:
    """Those that were killed, while the soak runs.

    Attributes:
        folder: Where they write.
        command: Starts a training, or resumes it.
        each: Kills of each training.
        wanted: What the uninterrupted one printed at its end.
        kills: So far.
        ended: Trainings that came to their end.
        faults: Other bits, errors, and files or processes that were left.
    """

    folder: Path
    command: Command = command
    each: int = KILLS
    wanted: str = ""
    kills: int = 0
    ended: int = 0
    faults: list[str] = field(default_factory=list)

    def run(self, left: Callable[[], float]) -> None:
        """Kill and resume as long as there is time for one more, at least once.

        Args:
            left: Seconds.
        """
        draw, longest = random.Random(0), 0.0
        self.wanted = self._train("whole", [])
        while not self.faults and (not self.ended or left() > longest):
            begin = time.monotonic()
            found = self._train(f"{self.ended}", [draw.randrange(1, STEPS // 10) for _ in range(self.each)])
            if found != self.wanted and not self.faults:
                self.faults.append(f"{found} after {self.each} kills, and {self.wanted} without")
            self.ended += 1
            longest = max(longest, time.monotonic() - begin)

    def rows(self, seconds: float) -> list[Row]:
        """As lines of the table; seconds: of the soak."""
        size, most = f"{self.ended} trainings of {STEPS} steps, {self.kills} kills", max(int(seconds // 60), 1)
        return [
            Row("C1", "kills of a training that saves", f"in {seconds:.0f} s", self.kills, most, "at least"),
            Row("C1", "resumed trainings that ended", f"of {STEPS} steps", self.ended, 1, "at least"),
            Row("C1", "resumed trainings with other bits, files or processes left", size, len(self.faults),
                faults=self.faults),
        ]  # fmt: skip

    def _train(self, name: str, kills: Sequence[int]) -> str:
        """One training to its end, killed after each of these numbers of steps; the last line that it printed."""
        folder, last = self.folder / name, ""
        folder.mkdir(parents=True)
        for steps in [*kills, None]:
            last, code = self._process(folder, steps)
            self.kills += code == -signal.SIGKILL and steps is not None
            if code == 0:
                break  # it may come to its end before the signal
            if code != -signal.SIGKILL or steps is None:
                self.faults.append(f"training {name}: exit code {code} after {last!r}")
                break
        if (rest := sorted(path.name for path in folder.iterdir())) != [STATE]:
            self.faults.append(f"training {name} leaves {rest}")
        return last

    def _process(self, folder: Path, steps: int | None) -> tuple[str, int]:
        """Start it, kill it after some steps, in the midst of the next one or of its save; its last line and code."""
        last, begin = "", time.monotonic()
        environment = {**os.environ, VARIABLE: "0"}  # another choice of an algorithm would be other bits
        with subprocess.Popen(
            self.command(folder), env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as child:
            clock = _Killed(child.pid, LONGEST)
            try:
                assert child.stdout is not None
                for at, line in enumerate(child.stdout, 1):
                    last = line.strip()
                    if at == steps:
                        time.sleep(random.Random(at).uniform(0, 0.01))
                        child.kill()
                child.wait()
            finally:
                clock.stop()
                apart.end(child)
        if time.monotonic() - begin > LONGEST:
            self.faults.append(f"ended after {LONGEST:.0f} s")
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return last, child.returncode
        self.faults.append(f"{folder.name}: a process is left")
        return last, child.returncode


class _Killed:
    """Kills a group of processes after some seconds, unless it is stopped before."""

    def __init__(self, group: int, seconds: float) -> None:
        self._timer = threading.Timer(seconds, lambda: os.killpg(group, signal.SIGKILL))
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Do not kill it."""
        self._timer.cancel()


def main(folder: Path, steps: int) -> None:
    """Train up to a step, from what is saved; each step is saved.

    Args:
        folder: Of the state.
        steps: In all.
    """
    machine = Machine(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    torch.use_deterministic_algorithms(True)
    run, path, losses = Run(machine, subjects(machine)[0], 0, machine.backend), folder / STATE, []
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=machine.device)
        run.load({**saved, "generator": saved["generator"].cpu()})
        losses = saved["losses"]
    for _ in range(len(losses), steps):
        run.train(1, lambda: None)
        losses.append(float(run.losses[-1]))
        content = io.BytesIO()
        torch.save({**run.state(), "losses": losses}, content)
        write_atomically(path, content.getvalue())
        print(losses[-1], flush=True)
    print(losses[-1], digest(torch.load(path, weights_only=True, map_location="cpu")), flush=True)


if __name__ == "__main__":
    apart.die_with_parent()
    main(Path(sys.argv[1]), int(sys.argv[2]))
