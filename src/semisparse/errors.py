"""Exceptions of semisparse. Each is also a ValueError, RuntimeError or ImportError, so that existing handlers catch it.

Every message names the argument, the value that was given and a way out, and a traceback the section of docs/errors.md.
That page is generated from the docstrings here (`python docs/errors_page.py`): the first paragraph says what an error
means, the last what to do.
"""

import functools


class SemiSparseError(Exception):
    """Base class of all errors that semisparse raises deliberately.

    Catch it to catch each of the errors below. The library raises only its subclasses, never the class itself.
    """

    @functools.cached_property
    def __notes__(self) -> list[str]:  # type: ignore[override]  # it can be written, as BaseException's
        """What Python shows below the message in a traceback; made when read, so that compiled code can raise."""
        if type(self).__module__ != __name__:  # a subclass elsewhere, which the page does not have
            return []
        return [f"What it means and what to do: docs/errors.md#{type(self).__name__.lower()}"]


class ConfigError(SemiSparseError, ValueError):
    """A setting is not among its choices, or two settings exclude each other.

    The message names the argument, its value and the choices. Change one of the named settings. For a config that was
    known to work, compare it with the fields of SparseConfig, or begin with a recipe such as recipes.safest().
    """


class ShapeError(SemiSparseError, ValueError):
    """A tensor or layer has a shape that cannot be 2:4 sparse.

    A mask needs in_features and out_features that are multiples of 4; what packed products need beyond that is in the
    message. Pad the dimension, or leave the layer dense. Without names sparsify leaves such layers dense and says so in
    its report; this error comes from layers and functions that are called directly.
    """


class TensorError(SemiSparseError, ValueError):
    """Tensors of one call disagree in dtype or device, or have a dtype that is not supported.

    Convert or move the tensor that the message names. A typical cause is a model that was moved, or cast, after a
    recipe or schedule had started: move the model first, then start it.
    """


class NoLayerMatchedError(SemiSparseError, ValueError):
    """A name or selection matched no layer, or a run would have changed nothing.

    The message lists the closest names. Names are those of model.named_modules(); a wrapper such as DDP, or
    torch.compile called as a function, puts a prefix before them, so swap before you wrap. sparsify's report has a row
    for every linear layer.
    """


class LayerRefusedError(SemiSparseError, ValueError):
    """A layer that was named or passed cannot be made semi-sparse, or dense; the message says why.

    Usual reasons are a subclass of nn.Linear (register_linear allows it), a parent that reads the weight itself, and a
    weight that is sharded already (swap before fully_shard). Do what the message says, or leave the layer out of the
    selection.
    """


class ScheduleError(SemiSparseError, ValueError):
    """Phases, layers or calls do not fit a schedule, or a saved state belongs to another one.

    Call schedule.step() once after each optimizer step, with the GradScaler if there is one. To resume, build the
    model, the schedule and the optimizer with the arguments of the first run, then load all of their states.
    """


class ExportError(SemiSparseError, RuntimeError):
    """An exporter cannot represent a sparse layer: torch.jit.script, ONNX, or torch.fx without a name for the layer.

    Call semisparse.densify(model) before the export. With weights="masked" the plain layers compute what the sparse
    ones did.
    """


class CheckpointError(SemiSparseError, ValueError):
    """A checkpoint file is not there, cannot be read, or has nothing to look at.

    check_checkpoint reads safetensors: a file, a folder, or the index of shards. Save other formats as safetensors
    first. Files of torch.save are not read, because they are pickles.
    """


class PlanError(SemiSparseError, ValueError):
    """There is no GPU to measure a plan on, or a plan's file is damaged, or it is the plan of another model.

    Make the plan anew with semisparse.plan on the machine that trains, and for the model as it is now. Without a GPU
    the command semisparse plan prints what was measured on others.
    """


class BenchError(SemiSparseError, ValueError):
    """The file of a self-check cannot be written, is not there, or is damaged.

    Name a folder that exists and that you may write to, or write the file again with semisparse bench --save.
    """


class RankMismatchError(SemiSparseError, RuntimeError):
    """The ranks of a data-parallel group hold different layers, settings or held masks, or resumed at different steps.

    Swap the same layers with the same config on every rank, and load the same checkpoint on all of them. The message
    names what differs. It is raised on every rank, so that none waits for another.
    """


class EngineError(SemiSparseError, RuntimeError):
    """The sparse GEMM engine cannot be used here, rejected a product, or was asked to tune during a graph capture.

    semisparse env says whether this machine has the engine, and why not. During a graph capture: run one warm-up step
    outside of it, or semisparse.tuning.tune before. Otherwise backend="auto" takes the masked dense product where no
    sparse one is right.
    """


class ContextLostError(SemiSparseError, RuntimeError):
    """An algorithm ended in an error of the GPU while it was tried, after which the process cannot use the GPU.

    The message names the algorithm and the product. Start the process again with SEMISPARSE_TUNE=0, which tries no
    algorithm, or take backend="dense" for the layers of that size, and report the message.
    """


class MissingPackageError(SemiSparseError, ImportError):
    """An integration cannot import the package that it is for; the message has the line for pip.

    Run that line, in the environment whose Python runs the training.
    """


class TokenMixingWarning(UserWarning):
    """A layer with a pruned activation was built: its output for one token depends on neighbouring tokens.

    In a causal model prune weights instead: no token may depend on later ones there. Given once per process; where the
    dependence is wanted, silence it with warnings.filterwarnings("ignore", category=semisparse.TokenMixingWarning).
    """
