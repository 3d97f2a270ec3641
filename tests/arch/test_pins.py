"""Development and CI install exact versions with hashes: each package that pip would bring along has a pin."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.arch.source import ROOT

OURS = {"semisparse", "semisparse-lab"}
WITH_TORCH = re.compile(r"nvidia-.*|cuda-toolkit|triton")
"""What a CUDA build of torch asks for, at exact versions of its own."""


def pins() -> dict[str, str]:
    """Name -> version of all constraints."""
    lines = [
        line.partition("#")[0].strip()
        for path in ROOT.glob("constraints*.txt")
        for line in path.read_text().splitlines()
    ]
    found = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): version for name, version in found}


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    """All packages that one asks for on this machine, as far as they are installed, with what these ask for."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    yield name
    try:
        requires = distribution(name).requires or []
    except PackageNotFoundError:  # of an extra that is installed elsewhere, such as the documentation's
        return
    for requirement in map(Requirement, requires):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            yield from needed(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)


def test_every_package_that_is_installed_along_has_an_exact_version() -> None:
    seen: set[tuple[str, frozenset[str]]] = set()
    names = {
        *needed("semisparse", frozenset({"dev", "docs"}), seen),
        *needed("semisparse-lab", frozenset({"text"}), seen),
    }
    if "torch" not in names:
        pytest.skip("the package is not installed, so that what it asks for is not known here")
    assert {"torch", "numpy", "pytest", "sphinx"} <= names
    assert {name for name in names - pins().keys() - OURS if not WITH_TORCH.fullmatch(name)} == set()


def pinned(text: str) -> list[tuple[str, str]]:
    """(name, version) of each pin, in their order."""
    found = re.findall(r"^([\w.-]+)==([\w.]+)", text, flags=re.MULTILINE)
    return [(canonicalize_name(name), version) for name, version in found]


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("constraints*.txt")))
def test_each_pin_but_torchs_has_the_hashes_of_its_version(name: str) -> None:
    hashed = (ROOT / "hashes" / name).read_text()
    wanted = [pin for pin in pinned((ROOT / name).read_text()) if pin[0] != "torch"]
    assert wanted and sorted(pinned(hashed)) == sorted(wanted), "run `make hashes`"
    entries = re.split(r"^(?=[\w.-]+==)", hashed, flags=re.MULTILINE)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}$", entry, flags=re.MULTILINE) for entry in entries)


def test_packages_are_installed_with_their_hashes() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in sorted(path.name for path in ROOT.glob("hashes/*.txt")):
        assert f"install $(HASHED) -r hashes/{name}\n" in makefile
    assert "HASHED := --require-hashes --no-deps\n" in makefile


def test_a_pin_is_one_version() -> None:
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins().values())


def test_what_stands_beside_another_torch_has_hashes_but_for_what_torch_brings_at_versions_of_its_own() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (listed,) = re.findall(r"^BESIDE_TORCH := (.+)$", makefile, flags=re.MULTILINE)
    names = {canonicalize_name(name) for name in listed.split()}
    assert names <= {name for name, _ in pinned((ROOT / "hashes" / "constraints.txt").read_text())}
    seen: set[tuple[str, frozenset[str]]] = set()
    along = {one for name in (*names, "torch") for one in needed(name, frozenset(), seen)}
    left = {name for name in along - names if not WITH_TORCH.fullmatch(name)}
    assert left == {"torch", "setuptools"}  # each torch wants another setuptools
