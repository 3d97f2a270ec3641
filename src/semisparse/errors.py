"""Exceptions of semisparse. Each is also a ValueError or a RuntimeError, so existing handlers keep working.

Every message names the argument, the value that was given and a way out.
"""


class SemiSparseError(Exception):
    """Base class of every error that semisparse raises on purpose."""


class ConfigError(SemiSparseError, ValueError):
    """A setting lies outside its choices, or two settings exclude each other."""


class ShapeError(SemiSparseError, ValueError):
    """A tensor or layer has a shape that cannot be 2:4 sparse."""


class TensorError(SemiSparseError, ValueError):
    """Tensors of one call disagree in dtype or device, or have a dtype that is not supported."""


class NoLayerMatchedError(SemiSparseError, ValueError):
    """A name or selection matched no layer, or a run would have changed nothing."""


class LayerRefusedError(SemiSparseError, ValueError):
    """A layer that was asked for by name cannot be made semi-sparse; the message says why."""


class ScheduleError(SemiSparseError, ValueError):
    """The phases of a schedule do not fit, or a saved schedule does not belong to this one."""


class ExportError(SemiSparseError, RuntimeError):
    """A sparse layer meets an exporter that would lose its gradients or does not know its ops."""


class RankMismatchError(SemiSparseError, RuntimeError):
    """The ranks of a data-parallel group hold different layers, settings or held masks."""


class EngineError(SemiSparseError, RuntimeError):
    """The sparse GEMM engine cannot be used here, refused a product, or was asked to tune where it must not."""


class TokenMixingWarning(UserWarning):
    """A layer with a pruned activation was built: what it computes of one token depends on its neighbours.

    Given once per process; silence it with warnings.filterwarnings("ignore", category=semisparse.TokenMixingWarning).
    """
