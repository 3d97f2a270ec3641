"""Every exception can be caught as ours and as the builtin it stands for."""

import inspect
import pickle
import traceback

import pytest
import torch

from semisparse import errors
from tests.arch.source import ROOT
from tests.arch.test_docs_links import anchors

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls is not errors.SemiSparseError]
RAISED = [cls for cls in CLASSES if not issubclass(cls, Warning)]


def test_there_are_errors_to_check() -> None:
    names = {cls.__name__ for cls in RAISED}
    assert {
        "ConfigError",
        "ShapeError",
        "TensorError",
        "NoLayerMatchedError",
        "LayerRefusedError",
        "ScheduleError",
    } <= names


@pytest.mark.parametrize("cls", RAISED, ids=lambda cls: cls.__name__)
def test_each_is_ours_and_also_a_value_runtime_or_import_error(cls: type[Exception]) -> None:
    assert issubclass(cls, errors.SemiSparseError)
    assert issubclass(cls, (ValueError, RuntimeError, ImportError))
    assert cls.__doc__
    with pytest.raises(errors.SemiSparseError, match="said"):
        raise cls("said")


@pytest.mark.parametrize("cls", RAISED, ids=lambda cls: cls.__name__)
def test_each_survives_pickling(cls: type[Exception]) -> None:
    again = pickle.loads(pickle.dumps(cls("said")))
    assert type(again) is cls
    assert str(again) == "said"


@pytest.mark.parametrize("cls", RAISED, ids=lambda cls: cls.__name__)
def test_a_traceback_names_the_section_of_the_page(cls: type[Exception]) -> None:
    error = pickle.loads(pickle.dumps(cls("said")))
    error.add_note("added by a caller")
    *_, note, added = traceback.format_exception(error)
    assert note == f"What it means and what to do: docs/errors.md#{cls.__name__.lower()}\n"
    assert added == "added by a caller\n"
    section = note.strip().partition("#")[2]
    assert section in set(anchors((ROOT / "docs" / "errors.md").read_text()))


def test_an_error_of_another_package_names_no_section() -> None:
    class Elsewhere(errors.ConfigError):
        pass

    assert traceback.format_exception(Elsewhere("said"))[-1].endswith("Elsewhere: said\n")


def test_compiled_code_raises_and_catches_them_without_a_graph_break() -> None:
    def caught(x: torch.Tensor) -> torch.Tensor:
        try:
            raise errors.ShapeError(f"x has shape {tuple(x.shape)}")
        except errors.ShapeError:
            return x + 1

    assert torch.compile(caught, backend="eager", fullgraph=True)(torch.zeros(2)).tolist() == [1, 1]
