"""Every exception can be caught as ours and as the builtin it stands for."""

import inspect
import pickle

import pytest

from semisparse import errors

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
