"""What a semi-sparse layer does under exporters other than torch.export.

torch.export needs no code here: the ops have registered fakes and gradient formulas.
"""

from typing import Any, NoReturn

from torch import nn
from torch.fx import Proxy

from semisparse.errors import ExportError
from semisparse.tracing import exporting_to_onnx


def fx_call(layer: nn.Module, input: Proxy) -> Any:
    """Record the layer as one call_module node, as torch.fx does for torch's own layers.

    Args:
        layer: The layer whose forward was called with a Proxy.
        input: That Proxy.

    Returns:
        The Proxy of the layer's output.

    Raises:
        ExportError: The tracer cannot name the layer, or the layer has forward hooks, which would run twice.
    """
    path_of = getattr(input.tracer, "path_of_module", None)
    path = "" if path_of is None else path_of(layer)
    if not path:
        raise ExportError(
            f"this tracer cannot name {layer} (it is the root, or modules are unknown to it): trace a module that "
            "holds the layer, or call semisparse.densify first"
        )
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise ExportError(
            f"{path} has forward hooks, which torch.fx would record beside the layer that runs them again: take "
            "them off while tracing, or call semisparse.densify first"
        )
    return input.tracer.create_proxy("call_module", path, (input,), {})


def refuse_script(layer: nn.Module) -> NoReturn:
    """Raise ExportError: torch.jit.script cannot compile the layer."""
    raise ExportError(
        f"torch.jit.script cannot compile the semi-sparse layer {layer}: call semisparse.densify(model) first "
        "(weights='masked' keeps what the sparse layers compute)"
    )


def refuse_onnx() -> None:
    """Raise ExportError if an ONNX export is running."""
    if exporting_to_onnx():
        raise ExportError(
            "ONNX has no operator for pruning: call semisparse.densify(model, weights='masked') before the export"
        )
