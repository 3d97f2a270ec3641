"""Exceptions of semisparse. Each is also a ValueError or a RuntimeError, so that existing handlers catch it.

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
    """A layer that was asked for by name cannot be made semi-sparse; the message says why."""


class ScheduleError(SemiSparseError, ValueError):
    """The phases, layers or calls of a schedule are not as they must be, or a saved state belongs to another one."""


class ExportError(SemiSparseError, RuntimeError):
    """A sparse layer was given to an exporter that would lose its gradients or does not support its ops."""


class RankMismatchError(SemiSparseError, RuntimeError):
    """The ranks of a data-parallel group hold different layers, settings or held masks."""


class EngineError(SemiSparseError, RuntimeError):
    """The sparse GEMM engine cannot be used here, rejected a product, or was asked to tune where it may not."""


class TokenMixingWarning(UserWarning):
    """A layer with a pruned activation was built: its output for one token depends on neighbouring tokens.

    Given once per process; silence it with warnings.filterwarnings("ignore", category=semisparse.TokenMixingWarning).
    """
