"""The torch.library ops of semisparse, one file per family. The functions here are how the package calls them.

On plain CUDA tensors some of them skip the dispatcher (register.py says when).
"""

from semisparse.ops.fp8 import (
    fp8_dense_product,
    quantise,
    quantise_formula,
    rescale,
    rescale_,
    rescale_formula,
)
from semisparse.ops.fp8_packed import fp8_linear, fp8_product, pack_fp8, unpack_fp8
from semisparse.ops.fp8_sampled_grad import fp8_sampled_grad_weight
from semisparse.ops.fp8_sampling import fp8_sampled_product, sample_fp8
from semisparse.ops.masks import prune, prune_tokens, tile_codes
from semisparse.ops.packing import pack, pack_tokens, pack_transpose, unpack
from semisparse.ops.packing_many import pack_many
from semisparse.ops.products import (
    pack_linear,
    packed_linear,
    packed_matmul,
    packed_tokens_grad_weight,
    packed_tokens_linear,
    packed_tokens_matmul,
    sac_save_ops,
)
from semisparse.ops.sampling import pack_sample, sample, sampled_grad_weight, sampled_linear

__all__ = [
    "fp8_dense_product",
    "fp8_linear",
    "fp8_product",
    "fp8_sampled_grad_weight",
    "fp8_sampled_product",
    "pack",
    "pack_fp8",
    "pack_linear",
    "pack_many",
    "pack_sample",
    "pack_tokens",
    "pack_transpose",
    "packed_linear",
    "packed_matmul",
    "packed_tokens_grad_weight",
    "packed_tokens_linear",
    "packed_tokens_matmul",
    "prune",
    "prune_tokens",
    "quantise",
    "quantise_formula",
    "rescale",
    "rescale_",
    "rescale_formula",
    "sac_save_ops",
    "sample",
    "sample_fp8",
    "sampled_grad_weight",
    "sampled_linear",
    "tile_codes",
    "unpack",
    "unpack_fp8",
]
