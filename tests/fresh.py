"""Python processes that begin with torch imported and nothing else: an import of torch takes two seconds, a fork none.

One process per test process imports torch and forks itself for each run; what runs there reads its environment, imports
semisparse and ends as in a process started for it alone. Another one has also imported torch._dynamo, as the first
optimizer of a program does, which takes as long again.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

PARENT = """
import gc, json, os, runpy, signal, sys
from importlib import import_module

for name in sys.argv[1:]:
    import_module(name)
gc.freeze()  # what is shared is not walked when a child ends
answers = os.dup(1)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    _, status = os.waitpid(child, 0)
    os.write(answers, f"{os.waitstatus_to_exitcode(status)}\\n".encode())
else:
    os._exit(0)

os.close(answers)
signal.alarm(asked["timeout"])
for to, name in enumerate(("stdin", "stdout", "stderr")):
    os.dup2(os.open(asked[name], os.O_RDONLY if name == "stdin" else os.O_WRONLY), to)
os.chdir(asked["cwd"])
os.environ.clear()
os.environ.update(asked["env"])
option, *rest = asked["arguments"]
if option == "-c":
    sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
    exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
elif option == "-m":
    sys.argv, sys.path[0] = rest, asked["cwd"]
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
else:
    sys.argv, sys.path[0] = [option, *rest], os.path.dirname(option)
    runpy.run_path(option, run_name="__main__")
"""


@functools.cache
def _parent(*modules: str) -> subprocess.Popen[str]:
    """The process that forks, with these modules. OMP_NUM_THREADS is read where torch is loaded, so it is 1 for all."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SEMISPARSE")}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def end() -> None:
        parent.communicate()

    atexit.register(end)
    return parent


def run(
    *arguments: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: int = 300,
    trains: bool = False,
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` does: a file, -m and a module, or -c and code, each with arguments of its own.

    Args:
        *arguments: those of the interpreter, as strings or anything with one.
        env: the whole environment; that of this process where it is not given.
        cwd: where it runs; the current folder where it is not given.
        timeout: seconds after which the process is ended by SIGALRM (returncode -14).
        trains: what runs builds an optimizer, which imports torch._dynamo: begin with it.
    """
    parent = _parent("torch", *(["torch._dynamo"] if trains else []))
    assert parent.stdin is not None and parent.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        asked = {
            "arguments": [str(argument) for argument in arguments],
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
            "timeout": timeout,
            "stdin": os.devnull,
            "stdout": str(out),
            "stderr": str(err),
        }
        parent.stdin.write(json.dumps(asked) + "\n")
        parent.stdin.flush()
        code = int(parent.stdout.readline())
        return subprocess.CompletedProcess(asked["arguments"], code, out.read_text(), err.read_text())
