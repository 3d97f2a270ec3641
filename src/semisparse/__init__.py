"""Faster PyTorch training with 2:4 (semi-structured) sparsity: train sparse, finish dense.

Importing this package does nothing but define names: no CUDA call, no environment read, no patching.
"""

from semisparse import errors, recipes, tuning
from semisparse._check import CheckReport, check
from semisparse._plan import Plan, plan
from semisparse.checkpoint import CheckpointReport, check_checkpoint
from semisparse.config import SparseConfig
from semisparse.errors import SemiSparseError, TokenMixingWarning
from semisparse.flops import register_flop_formulas
from semisparse.metrics import MaskMetrics, mask_statistics
from semisparse.nn import PackedWeights, SemiSparseActivationLinear, SemiSparseLinear, register_linear, reuse_packed
from semisparse.ops import sac_save_ops
from semisparse.schedule.guard_state import GuardReport
from semisparse.schedule.loss_guard import LossGuard
from semisparse.schedule.phases import Phase
from semisparse.schedule.sparse_schedule import SparseSchedule
from semisparse.surgery.conv1d import conv1d_to_linear, linear_to_conv1d
from semisparse.surgery.densify import densify
from semisparse.surgery.layers import semi_sparse_layers
from semisparse.surgery.report import SwapReport
from semisparse.surgery.swap import sparsify
from semisparse.surgery.torchao import (
    not_swapped,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)
from semisparse.versions import __version__ as __version__

__all__ = [
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
]
