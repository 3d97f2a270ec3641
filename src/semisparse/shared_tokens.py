"""Tokens in e4m3 that several layers share: those that read the same input round it once.

In compiled code the compiler finds equal calls of ops.quantise by itself. In eager code one input per thread is
remembered, the last one, until another one comes or the tensor dies. It is known by identity, version and address, and
each weight uses it once: a weight that comes again begins a new pass, which rounds anew. So an input that is written to
without a trace in its version (by a replayed CUDA graph, say) is rounded again at each pass, unless that reaches none
of the layers that the one before reached. Trainable leaves are not remembered: fused optimizers write so.
"""

import threading
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from semisparse import ops
from semisparse.errors import TensorError
from semisparse.operands import as_tokens

_Tokens = tuple[Tensor, Tensor, Tensor]


class _State(NamedTuple):
    """What tells two states of an input apart, and two uses of one state that must not share memory."""

    version: int
    address: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    stream: int
    inference: bool  # what is rounded in inference mode cannot be saved for a backward


class _Last:
    """The last input of a thread, rounded."""

    def __init__(self, input: Tensor, state: _State, tokens: _Tokens) -> None:
        self.state = state
        self.tokens: _Tokens | None = tokens
        self.users: set[int] = set()
        self.input: ReferenceType[Tensor] = ref(input, self.forget)

    def forget(self, _: object = None) -> None:
        """Free the memory of the tokens."""
        self.tokens = None

    def found(self, input: Tensor, state: _State, user: int, columns: bool) -> _Tokens | None:
        """The tokens, if they are those of input and user has not used them."""
        tokens = self.tokens
        if tokens is None or self.input() is not input or self.state != state or user in self.users:
            return None
        return tokens if tokens[1].numel() or not (columns and tokens[0].numel()) else None


_here = threading.local()


def quantised(input: Tensor, weight: Tensor, *, columns: bool) -> _Tokens:
    """ops.quantise(input as M x K, True, columns), or what it gave for the same input before.

    Args:
        input: (..., K).
        weight: Of the layer that reads input.
        columns: Whether the transpose is wanted; it may be there also where it is not.

    Raises:
        TensorError: input has no strides.
    """
    if input.layout is not torch.strided:
        raise TensorError(f"input has the layout {input.layout}; fp8 takes strided tensors: call input.to_dense()")
    if not _plain(input):
        return ops.quantise(as_tokens(input).detach(), True, columns)
    stream = torch.cuda.current_stream(input.device).cuda_stream if input.is_cuda else 0
    inference = torch.is_inference_mode_enabled()
    state = _State(input._version, input.data_ptr(), input.dtype, input.shape, input.stride(), stream, inference)
    last: _Last | None = getattr(_here, "last", None)
    found = None if last is None else last.found(input, state, id(weight), columns)
    if last is None or found is None:
        if last is not None:
            last.forget()  # before more memory is taken
        found = ops.quantise(as_tokens(input).detach(), True, columns)
        last = _here.last = _Last(input, state, found)
    last.users.add(id(weight))
    return found


def _plain(input: Tensor) -> bool:
    """Whether only eager PyTorch sees this call (no compiler, mode, transform, subclass or CUDA graph), and no
    optimizer writes to input.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or type(input) not in (Tensor, torch.nn.Parameter)
        or input.is_inference()
        or (input.requires_grad and input.is_leaf)
        or input.device.type not in ("cpu", "cuda")
        or (input.is_cuda and torch.cuda.is_current_stream_capturing())
    )
