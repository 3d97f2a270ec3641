"""The frozen list of public names, and that each of them is documented: by a docstring and in docs/public.md."""

import ast
import inspect
import re

import pytest

import semisparse
import semisparse.testing
from semisparse import errors, recipes, tuning
from tests.arch.source import PACKAGE, ROOT

PUBLIC = {
    "CheckReport",
    "CheckpointReport",
    "GuardReport",
    "LossGuard",
    "MaskMetrics",
    "PackedWeights",
    "Phase",
    "Plan",
    "SemiSparseActivationLinear",
    "SemiSparseError",
    "SemiSparseLinear",
    "SparseConfig",
    "SparseSchedule",
    "SwapReport",
    "TokenMixingWarning",
    "check",
    "check_checkpoint",
    "conv1d_to_linear",
    "densify",
    "errors",
    "linear_to_conv1d",
    "mask_statistics",
    "not_swapped",
    "plan",
    "recipes",
    "register_flop_formulas",
    "register_linear",
    "reuse_packed",
    "sac_save_ops",
    "semi_sparse_layers",
    "sparsify",
    "swap_linear_with_semi_sparse_linear",
    "swap_semi_sparse_linear_with_linear",
    "tuning",
}
ERRORS = {
    "BenchError",
    "CheckpointError",
    "ConfigError",
    "ContextLostError",
    "EngineError",
    "ExportError",
    "LayerRefusedError",
    "MissingPackageError",
    "NoLayerMatchedError",
    "PlanError",
    "RankMismatchError",
    "ScheduleError",
    "SemiSparseError",
    "ShapeError",
    "TensorError",
    "TokenMixingWarning",
}
RECIPES = {
    "MaskedDecay",
    "PRESETS",
    "Recipe",
    "RecipeSchedule",
    "StepAdamW",
    "dinov2",
    "fastest",
    "fst",
    "s_ste",
    "safest",
    "sr_ste",
    "step",
}
INTEGRATIONS = {
    "fsdp": {"GatherReport", "compress_all_gather"},
    "huggingface": {"SparseCallback"},
    "lightning": {"SparseCallback"},
    "torchtitan": {"ScheduleHook", "SemiSparseConverter"},
}
TUNING = {"Choice", "TunedProblem", "TuningReport", "choices", "load_state", "share", "state", "tune"}
TESTING = {
    "DTYPES",
    "HALF_DTYPES",
    "LINEAR_SHAPES",
    "TOKEN_COUNTS",
    "assert_as_good_as_torch",
    "assert_bit_equal",
    "assert_same_up_to_rounding",
    "small_integers",
}


def test_the_public_names_are_these() -> None:
    assert set(semisparse.__all__) == PUBLIC
    assert len(semisparse.__all__) == len(PUBLIC)
    assert all(hasattr(semisparse, name) for name in PUBLIC)


def test_the_errors_are_these() -> None:
    assert {name for name, value in vars(errors).items() if inspect.isclass(value)} == ERRORS


def test_the_recipes_names_are_these() -> None:
    assert set(recipes.__all__) == RECIPES


def test_the_tuning_names_are_these() -> None:
    assert set(tuning.__all__) == TUNING


def test_the_testing_names_are_these() -> None:
    assert set(semisparse.testing.__all__) == TESTING


def test_the_names_of_the_integrations_are_these() -> None:
    for host, names in INTEGRATIONS.items():  # read, because their packages need not be installed
        file = PACKAGE / "integrations" / host / "__init__.py"
        body = ast.parse((file if file.exists() else file.parent.with_suffix(".py")).read_text()).body
        listed = [
            node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        assert set(ast.literal_eval(listed[0])) == names


def test_the_page_of_public_names_lists_each_of_them_once() -> None:
    listed = re.findall(
        r"^\| `semisparse\.([\w.]+)` \| \S", (ROOT / "docs" / "public.md").read_text(), flags=re.MULTILINE
    )
    names = [*PUBLIC, *(f"recipes.{name}" for name in RECIPES), *(f"testing.{name}" for name in TESTING)]
    names += [f"tuning.{name}" for name in TUNING]
    names += [f"integrations.{host}.{name}" for host, own in INTEGRATIONS.items() for name in own]
    names += [f"errors.{name}" for name in ERRORS - PUBLIC]
    assert sorted(listed) == sorted(names)


def test_the_version_is_a_version() -> None:
    assert [part.isdigit() for part in semisparse.__version__.split(".")] == [True] * 3


def documented(value: object) -> list[tuple[str, object]]:
    """The value and, for a class, its own public methods and properties."""
    name = getattr(value, "__qualname__", repr(value))
    members = vars(value).items() if inspect.isclass(value) else ()
    return [(name, value)] + [
        (f"{name}.{member}", getattr(value, member))
        for member, raw in members
        if not member.startswith("_") and (callable(raw) or isinstance(raw, property | classmethod))
    ]


ITEMS = [
    item
    for module in (semisparse, recipes, tuning, semisparse.testing, errors)
    for name, value in vars(module).items()
    if not name.startswith("_") and callable(value) and name in getattr(module, "__all__", vars(module))
    for item in documented(value)
]


def test_there_is_something_to_document() -> None:
    assert {"sparsify", "SparseSchedule.step", "SwapReport.skipped"} <= {name for name, _ in ITEMS}


@pytest.mark.parametrize(("name", "value"), ITEMS, ids=[name for name, _ in ITEMS])
def test_every_public_name_has_a_docstring_and_annotations(name: str, value: object) -> None:
    text = inspect.getdoc(value)
    assert text, name
    assert len(text.split()) >= 4, f"{name}: {text!r}"
    if inspect.isfunction(value):
        unannotated = [
            p.name
            for p in inspect.signature(value).parameters.values()
            if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not unannotated
        assert inspect.signature(value).return_annotation is not inspect.Signature.empty
