"""No code of ours runs what a file says, and shared libraries come from where they belong."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arch.source import ROOT

FOLDERS = ("src", "lab/src", "benchmarks", "examples", "csrc")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
CALLS = {"eval", "exec", "__import__"}
NAMED = {"os.system", "os.popen", "pickle.load", "pickle.loads", "ctypes.cdll.LoadLibrary"}

EXEMPT = {("src/semisparse/cli/common.py", "exec('')")}
"""exec of an empty text, which works around a defect of CPython's exit (said there)."""

LIBRARIES = {
    ("src/semisparse/native/interface.py", "ctypes.CDLL(str(path))"): "launch.so beside the package",
    ("src/semisparse/native/foreign.py", "ctypes.CDLL('libcuda.so.1')"): "CUDA's driver, as torch loads it",
    ("src/semisparse/native/foreign.py", "ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)"): "torch's own",
    ("src/semisparse/gemm/addresses.py", "ctypes.CDLL(paths.pop(), mode=os.RTLD_NOLOAD | os.RTLD_NOW)"): "in memory",
}
"""Every place that opens a shared library, and which."""


def found(text: str) -> Iterator[str]:
    """What of a file's code could run what a file says."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe = (
                called in CALLS | NAMED
                or (called == "torch.load" and options.get("weights_only") != "True")
                or options.get("allow_pickle", "False") != "False"
                or options.get("shell", "False") != "False"
            )
            if unsafe:
                yield ast.unparse(node)


def opened(text: str) -> Iterator[str]:
    """The calls that open a shared library."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "CDLL",
            "PyDLL",
            "load_library",
        ):
            yield ast.unparse(node)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_file_of_ours_unpickles_evaluates_or_starts_a_shell() -> None:
    assert {(name(path), what) for path in FILES for what in found(path.read_text())} == EXEMPT


def test_every_place_that_opens_a_shared_library_is_known() -> None:
    texts = {path: text for path in FILES if "DLL" in (text := path.read_text()) or "load_library" in text}
    assert {(name(path), what) for path, text in texts.items() for what in opened(text)} == set(LIBRARIES)


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from pickle import loads", "import yaml", "eval(x)", "torch.load(path)",
     "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "subprocess.run(x, shell=True)"],
)  # fmt: skip
def test_what_is_forbidden_would_be_found(text: str) -> None:
    assert list(found(text))
