"""Exceptions of semisparse. Each is also a ValueError, RuntimeError or ImportError, so that existing handlers catch it.

Every message names the argument, the value that was given and a way out.
"""


class SemiSparseError(Exception):
    """Base class of all errors that semisparse raises deliberately."""


class ConfigError(SemiSparseError, ValueError):
    """A setting is not among its choices, or two settings exclude each other."""


class ShapeError(SemiSparseError, ValueError):
    """A tensor or layer has a shape that cannot be 2:4 sparse."""


class TensorError(SemiSparseError, ValueError):
    """Tensors of one call disagree in dtype or device, or have a dtype that is not supported."""


class NoLayerMatchedError(SemiSparseError, ValueError):
    """A name or selection matched no layer, or a run would have changed nothing."""


class LayerRefusedError(SemiSparseError, ValueError):
    """A layer that was named or passed cannot be made semi-sparse, or dense; the message says why."""


class ScheduleError(SemiSparseError, ValueError):
    """Phases, layers, calls or a guard's reference do not fit a schedule, or a saved state belongs to another one."""


class ExportError(SemiSparseError, RuntimeError):
    """An exporter cannot represent a sparse layer: torch.jit.script, ONNX, or torch.fx without a name for the layer."""


class CheckpointError(SemiSparseError, ValueError):
    """A checkpoint file is not there, cannot be read, or has nothing to look at."""


class PlanError(SemiSparseError, ValueError):
    """There is no GPU to measure a plan on, or a plan's file is damaged, or it is the plan of another model."""


class BenchError(SemiSparseError, ValueError):
    """The file of a self-check cannot be written, is not there, or is damaged."""


class RankMismatchError(SemiSparseError, RuntimeError):
    """The ranks of a data-parallel group hold different layers, settings or held masks."""


class EngineError(SemiSparseError, RuntimeError):
    """The sparse GEMM engine cannot be used here, rejected a product, or was asked to tune during a graph capture."""


class MissingPackageError(SemiSparseError, ImportError):
    """An integration cannot import the package that it is for; the message has the line for pip."""


class TokenMixingWarning(UserWarning):
    """A layer with a pruned activation was built: its output for one token depends on neighbouring tokens.

    Given once per process; silence it with warnings.filterwarnings("ignore", category=semisparse.TokenMixingWarning).
    """
