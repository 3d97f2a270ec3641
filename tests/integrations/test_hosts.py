"""An integration without its package says what to install."""

import importlib
import re
import sys

import pytest

from semisparse.errors import MissingPackageError
from semisparse.integrations import hosts
from tests.arch.source import ROOT


@pytest.mark.parametrize("host", ["huggingface", "lightning", "torchtitan"])
def test_a_missing_package_is_an_error_with_the_line_for_pip(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"semisparse.integrations.{host}"
    for package in ("transformers", "lightning", "torchtitan"):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(MissingPackageError, match=rf"{module} cannot import .*: pip install \w+"):
        importlib.import_module(module)


def test_the_tested_versions_are_those_that_ci_installs() -> None:
    pins = "".join((ROOT / name).read_text() for name in ("constraints.txt", "constraints-torchtitan.txt"))
    by_hand = {"timm"}  # needs torchvision, whose wheels do not load beside a CPU build of torch
    for package, version in hosts.TESTED.items():
        assert f"\n{package}=={version}\n" in pins or package in by_hand


def test_the_page_names_the_tested_versions() -> None:
    row = re.search(r"^\| tested version \|(.*)\|$", (ROOT / "docs" / "trainers.md").read_text(), re.MULTILINE)
    assert row is not None
    assert sorted(cell.strip() for cell in row[1].split("|")) == sorted(hosts.TESTED.values())
