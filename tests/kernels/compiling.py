"""Compiles every kernel for a GPU architecture that need not be there; prints what each variant takes, as JSON.

    python tests/kernels/compiling.py 90
    python tests/kernels/compiling.py 90 4    one variant in four

A program of its own, because the tests around it run Triton's interpreter in the same process.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from semisparse import masks
from semisparse.formats.layout import SM90_8BIT, SM90_16BIT
from semisparse.kernels import (
    amax,
    amax_many,
    bias,
    kept_values,
    prune_pack,
    prune_pack8,
    prune_pack8_many,
    prune_pack_many,
    quantise,
    rescale,
    sample_pack,
    sample_pack8,
    tile_codes,
    unpack,
)
from semisparse.kernels.compiled import compiled_launch, parameter_count
from semisparse.kernels.packed_metadata import repeated
from semisparse.kernels.prune_pack import DEFAULT_BLOCK, HOPPER_BLOCK

EVERY = int(sys.argv[2]) if len(sys.argv) > 2 else 1
CALLS = count()
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BITS = SM90_16BIT.bits


def compiled(kernel, types, constants, arch, divisible, **options):
    """What a kernel takes and how it moves data; types: of all arguments in order, divisible: those that are by 16."""
    if next(CALLS) % EVERY:
        return {}
    signature = types | dict.fromkeys(constants, "constexpr")
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    found = kernel.asm
    binary = found["cubin"]
    moves = Counter(re.findall(r"\b(?:ld|st)\.(?:global|shared)[.:\w]*", found["ptx"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    local = re.search(r"LOCAL:(\d+)", usage)
    return {
        "registers": int(registers),
        "stack": int(stack) + int(local[1] if local else 0),
        "moves": moves,
        "launch": launch(kernel, types, constants),
        "parameters": parameter_count(found["ptx"]),
    }


def launch(kernel, types, constants):
    """The parameters by which semisparse starts the kernel without Triton, or why it can't, and what they must be."""
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    sizes = {name: place for place, name in enumerate(types) if name not in pointers}
    found = compiled_launch(
        SimpleNamespace(metadata=kernel.metadata, src=kernel.src, asm=kernel.asm, function=1),  # loading needs a GPU
        (1, 1, 1),
        tuple(None if name in constants else name for name in pointers),
        tuple(constants.get(name, value) for name, value in sizes.items()),
    )
    wanted = [(place, 0) for place, name in enumerate(pointers) if name not in constants]
    wanted += [(-1, value) for name, value in sizes.items() if name not in constants]
    return {"found": found if isinstance(found, str) else found.parameters, "wanted": [*wanted, (-1, 0), (-1, 0)]}


def pack(arch, source, target, mask, even, wide=False, given_codes=False, aligned=False, transpose_only=False):
    pointers = {"matrix": "*i64", "codes": "*i16", "scale": "*fp32", "packed": "*u8", "packed_t": "*u8"}
    sizes = ("rows", "rows_padded", "columns", "stride", "row_blocks", "blocks", "row_blocks_t", "blocks_t")
    block = HOPPER_BLOCK if arch == 90 and source is tl.bfloat16 else DEFAULT_BLOCK
    constant = masks.GIVEN_CODES if given_codes else mask.constant
    constants = {
        "IN": source, "OUT": target, "MASK": constant, "TRANSPOSED": mask.both_ways, "BITS": BITS,
        "PADDING": repeated(0b1110),
        "TILE_ROWS": block.tile_rows, "PAIRS": block.pairs, "EVEN": even, "WIDE": wide,
        "NATIVE": True,
    }  # fmt: skip
    absent = {"codes": not given_codes, "scale": not mask.needs_scale, "packed_t": not mask.both_ways}
    absent["packed"] = transpose_only
    constants |= {name: None for name, missing in absent.items() if missing}
    divisible = [
        name
        for name in (*pointers, "rows_padded", "columns", *(["stride"] if aligned else []))
        if name not in constants and name != "scale"
    ]
    types = pointers | dict.fromkeys(sizes, "i32")
    options = {"num_warps": block.warps} | ({} if wide else {"maxnreg": block.registers})
    taken = compiled(prune_pack.prune_pack, types, constants, arch, divisible, **options)
    return taken if wide else taken | {"most registers": block.registers}


def pack8(arch, source, mask, even, wide=False, given_codes=False, transpose_only=False, words=1):
    pointers = {"matrix": "*i64", "codes": "*i16", "largest": "*i32", "scale": "*fp32"}
    pointers |= {"packed": "*u8", "packed_t": "*u8"}
    sizes = ("rows", "columns", "stride", "count", "row_blocks", "blocks", "row_blocks_t", "blocks_t")
    block = prune_pack8.BLOCK
    constants = {
        "IN": source, "MASK": masks.GIVEN_CODES if given_codes else mask.constant, "BITS": SM90_8BIT.bits,
        "PADDING": repeated(0b1110), "TILE_ROWS": block.tile_rows, "PAIRS": block.pairs, "EVEN": even, "WIDE": wide,
        "NATIVE": True, "CONVERTS": arch >= 89, "WORDS": words,
    }  # fmt: skip
    absent = {"codes": not given_codes, "packed": transpose_only, "packed_t": not mask.both_ways}
    constants |= {name: None for name, missing in absent.items() if missing}
    divisible = [name for name in (*pointers, "rows", "columns") if name not in constants and name != "scale"]
    options = {"num_warps": block.warps} | ({} if wide else {"maxnreg": block.registers})
    types = pointers | dict.fromkeys(sizes, "i32")
    return compiled(prune_pack8.prune_pack8, types, constants, arch, divisible, **options)


def many(arch, source, target, mask, even, given_codes=False):
    block = prune_pack_many.HOPPER_BLOCK if arch == 90 and source is tl.bfloat16 else DEFAULT_BLOCK
    constants = {
        "IN": source, "OUT": target, "MASK": masks.GIVEN_CODES if given_codes else mask.constant,
        "TRANSPOSED": mask.both_ways, "BITS": BITS, "PADDING": repeated(0b1110),
        "TILE_ROWS": block.tile_rows, "PAIRS": block.pairs, "EVEN": even, "WIDE": False, "NATIVE": True,
        "ENTRY": prune_pack_many.ENTRY,
    }  # fmt: skip
    types = {"table": "*i64", "member_of": "*i32"}
    options = {"num_warps": block.warps, "maxnreg": block.registers}
    taken = compiled(prune_pack_many.prune_pack_many, types, constants, arch, list(types), **options)
    return taken | {"most registers": block.registers}


def many8(arch, source, mask, even):
    limited = arch in (89, 90) and mask.both_ways
    block = prune_pack8_many.LIMITED_BLOCK if limited else prune_pack8.BLOCK
    constants = {
        "IN": source, "MASK": mask.constant, "BITS": SM90_8BIT.bits,
        "PADDING": repeated(0b1110), "TILE_ROWS": block.tile_rows, "PAIRS": block.pairs, "EVEN": even, "WIDE": False,
        "NATIVE": True, "CONVERTS": arch >= 89, "TRANSPOSED": mask.both_ways, "ENTRY": prune_pack8_many.ENTRY,
    }  # fmt: skip
    types = {"table": "*i64", "member_of": "*i32", "scales": "*fp32"}
    options = {"num_warps": block.warps, "maxnreg": block.registers}
    taken = compiled(prune_pack8_many.prune_pack8_many, types, constants, arch, list(types), **options)
    return taken | ({} if block.registers is None else {"most registers": block.registers})


def sample(arch, dtype, even, wide=False, seeded=True, summed=True):
    types = {"gradient": "*i64", "seed": "*i64", "packed": "*u8", "sums": "*fp32"}
    types |= dict.fromkeys(("rows", "rows_padded", "columns", "stride", "row_blocks", "blocks"), "i32")
    block = sample_pack.BLOCK
    constants = {
        "TYPE": dtype, "BITS": BITS, "PADDING": repeated(0b1110), "TILE_ROWS": block.tile_rows, "PAIRS": block.pairs,
        "EVEN": even, "WIDE": wide, "NATIVE": True,
    }  # fmt: skip
    constants |= {name: None for name, given in (("seed", seeded), ("sums", summed)) if not given}
    divisible = [
        name for name in ("gradient", "seed", "packed", "sums", "rows_padded", "columns") if name not in constants
    ]
    return compiled(sample_pack.sample_pack, types, constants, arch, divisible, num_warps=block.warps)


def sample8(arch, dtype, even, wide=False, summed=True):
    types = {"gradient": "*i64", "seed": "*i64", "largest": "*i32", "rows8": "*i32", "packed": "*u8", "sums": "*fp32"}
    types |= {"scale": "*fp32", "scale_sample": "*fp32"}
    types |= dict.fromkeys(("rows", "rows_padded", "columns", "stride", "count", "row_blocks", "blocks"), "i32")
    block = sample_pack8.BLOCK
    constants = {
        "IN": dtype, "BITS": SM90_8BIT.bits, "PADDING": repeated(0b1110), "TILE_ROWS": block.tile_rows,
        "PAIRS": block.pairs, "EVEN": even, "WIDE": wide, "NATIVE": True, "CONVERTS": arch >= 89,
        "WORDS": amax.MOST_PROGRAMS,
    }  # fmt: skip
    constants |= {} if summed else {"sums": None}
    divisible = [
        name
        for name in ("gradient", "seed", "largest", "rows8", "packed", "sums", "rows_padded", "columns")
        if name not in constants
    ]
    options = {"num_warps": block.warps} | ({} if wide else {"maxnreg": block.registers})
    return compiled(sample_pack8.sample_pack8, types, constants, arch, divisible, **options)


def codes(arch, source, mask, turned):
    """A contiguous matrix, or the transpose of one that is a single row of tiles: Triton makes sizes of 1 constants."""
    types = {"matrix": f"*{source}", "codes": "*i16"}
    types |= dict.fromkeys(("tile_rows", "tile_columns", "row_stride", "column_stride"), "i32")
    ones = dict.fromkeys(("tile_rows", "row_stride") if turned else ("column_stride",), 1)
    constants = ones | {"MASK": mask.constant, "TILES": tile_codes.TILES}
    return compiled(tile_codes.tile_codes, types, constants, arch, ["matrix", "codes"], num_warps=4)


def largest(arch, dtype):
    """For one matrix, one of a single block, and many."""
    constants = {"TYPE": dtype, "ROWS": amax.ROWS, "COLUMNS": amax.COLUMNS}
    types = {"matrix": "*i32", "partials": "*i32"} | dict.fromkeys(("rows", "columns", "stride", "blocks"), "i32")
    given, options = ["matrix", "partials"], {"num_warps": amax.WARPS}
    one = compiled(amax.amax, types, constants, arch, given, **options)
    ones = dict.fromkeys(("rows", "columns", "stride", "blocks"), 1)
    small = compiled(amax.amax, types, constants | ones, arch, given, **options)
    types = {"table": "*i64", "member_of": "*i32", "partials": "*i32"}
    constants |= {"ENTRY": amax_many.ENTRY}
    many = compiled(amax_many.amax_many, types, constants, arch, list(types), **options)
    return {f"amax {dtype}": one, f"amax {dtype}, one block": small, f"amax many {dtype}": many}


def round_to_e4m3(arch, dtype, even, rows=True, columns=True, wide=False):
    types = {"x": f"*{dtype}", "partials": "*i32", "x8": "*u8", "x8t": "*i32", "scale": "*fp32"}
    types |= dict.fromkeys(("rows", "rows_padded", "columns", "stride", "count"), "i32")
    block = quantise.BLOCK
    constants = {
        "PIECE": 128 // dtype.primitive_bitwidth, "FOURS": block.fours, "COLUMNS": block.columns,
        "WORDS": amax.MOST_PROGRAMS, "EVEN": even, "WIDE": wide, "NATIVE": arch >= 89,
    }  # fmt: skip
    constants |= {name: None for name, given in (("x8", rows), ("x8t", columns)) if not given}
    divisible = [name for name in types if types[name].startswith("*") and name not in constants]
    return compiled(quantise.quantise, types, constants, arch, divisible, num_warps=block.warps)


def fp8(arch):
    """All kernels of fp8."""
    found = {}
    for dtype in (tl.bfloat16, tl.float16, tl.float32):
        found |= largest(arch, dtype)
        for even in (True, False):
            found[f"quantise {dtype} {'even' if even else 'edges'}"] = round_to_e4m3(arch, dtype, even)
        found[f"quantise {dtype} rows"] = round_to_e4m3(arch, dtype, True, columns=False)
        found[f"quantise {dtype} columns"] = round_to_e4m3(arch, dtype, True, rows=False)
    found["quantise wide"] = round_to_e4m3(arch, tl.bfloat16, False, wide=True)
    found["quantise wide rows"] = round_to_e4m3(arch, tl.bfloat16, False, columns=False, wide=True)
    types = {"partials": "*i32", "starts": "*i32", "scales": "*fp32", "count": "i32"}
    for name, constants in (("one", {"starts": None}), ("many", {})):
        constants |= {"WORDS": amax.MOST_PROGRAMS}
        divisible = [name for name in ("partials", "starts", "scales") if name not in constants]
        found[f"scale of {name}"] = compiled(amax.scale_of, types, constants, arch, divisible, num_warps=1)
    for given, written in ((tl.bfloat16, tl.bfloat16), (tl.float32, tl.float16), (tl.float32, tl.float32)):
        for flat in (False, True):
            types = {"y": f"*{given}", "scale_a": "*fp32", "scale_b": "*fp32", "bias": f"*{written}"}
            types |= {"out": f"*{written}", "rows": "i32", "columns": "i32"}
            constants = {"TYPE": written, "ROWS": rescale.ROWS, "COLUMNS": rescale.COLUMNS, "FLAT": flat}
            constants |= {"NATIVE": True} | ({"bias": None, "columns": 1} if flat else {})
            divisible = [name for name in ("y", "bias", "out") if name not in constants]
            options = {"num_warps": rescale.WARPS, "enable_fp_fusion": False}
            found[f"rescale {given} {written}{' flat' * flat}"] = compiled(
                rescale.rescale, types, constants, arch, divisible, **options
            )
    return found


def main(arch):
    found = fp8(arch)
    for name, mask in masks.MASKS.items():
        for source, turned in ((tl.bfloat16, False), (tl.float16, False), (tl.float32, False), (tl.float32, True)):
            found[f"tile_codes {name} {source}{' turned' * turned}"] = codes(arch, source, mask, turned)
    packable = {name: mask for name, mask in masks.MASKS.items() if mask.chosen_while_packing}
    for name, mask in (*packable.items(), ("codes", packable["transposable"])):
        given = name == "codes"
        for source, target in ((tl.bfloat16, tl.bfloat16), (tl.float32, tl.float16)):
            for even in (True, False) if name == "transposable" else (False,):
                found[f"pack {name} {source} {'even' if even else 'edges'}"] = pack(
                    arch, source, target, mask, even, False, given
                )
                found[f"pack aligned {name} {source} {'even' if even else 'edges'}"] = pack(
                    arch, source, target, mask, even, False, given, aligned=True
                )
                found[f"pack many {name} {source} {'even' if even else 'edges'}"] = many(
                    arch, source, target, mask, even, given
                )
                for aligned in (False, True) if mask.both_ways else ():
                    variant = f"{'aligned ' * aligned}{name} {source} {'even' if even else 'edges'}"
                    found[f"pack transpose {variant}"] = pack(
                        arch, source, target, mask, even, False, given, aligned, transpose_only=True
                    )
        found[f"pack {name} wide"] = pack(arch, tl.bfloat16, tl.bfloat16, mask, False, True, given)
        if mask.both_ways:
            found[f"pack transpose {name} wide"] = pack(
                arch, tl.bfloat16, tl.bfloat16, mask, False, True, given, transpose_only=True
            )
    transposable = packable["transposable"]
    for source in (tl.bfloat16, tl.float16, tl.float32):
        found[f"pack8 {source} edges"] = pack8(arch, source, transposable, False)
    found["pack8 bf16 even"] = pack8(arch, tl.bfloat16, transposable, True)
    found["pack8 bf16 row"] = pack8(arch, tl.bfloat16, packable["row"], False)
    found["pack8 bf16 codes"] = pack8(arch, tl.bfloat16, transposable, False, given_codes=True)
    # One of the fewest registers and one of the most.
    found["pack8 many bf16 row"] = many8(arch, tl.bfloat16, packable["row"], False)
    found["pack8 many fp32 even"] = many8(arch, tl.float32, transposable, True)
    found["pack8 bf16 transpose"] = pack8(arch, tl.bfloat16, transposable, False, transpose_only=True)
    found["pack8 bf16 wide"] = pack8(arch, tl.bfloat16, transposable, False, wide=True)
    found["pack8 bf16 of partial maxima"] = pack8(arch, tl.bfloat16, transposable, True, words=512)
    for dtype in (tl.bfloat16, tl.float16):
        for even in (True, False):
            found[f"sample {dtype} {'even' if even else 'edges'}"] = sample(arch, dtype, even)
    found["sample wide"] = sample(arch, tl.bfloat16, False, wide=True)
    found["sample without seed and bias"] = sample(arch, tl.bfloat16, True, seeded=False, summed=False)
    if arch >= 89:  # below, nothing is computed in fp8
        for dtype in (tl.bfloat16, tl.float16, tl.float32):
            found[f"sample8 {dtype} edges"] = sample8(arch, dtype, False)
        found["sample8 bf16 even"] = sample8(arch, tl.bfloat16, True)
        found["sample8 wide"] = sample8(arch, tl.bfloat16, False, wide=True)
        found["sample8 without bias"] = sample8(arch, tl.bfloat16, True, summed=False)
    types = {"matrix": "*fp32", "out": "*bf16", "rows": "i32", "columns": "i32"}
    constants = {"ROWS": bias.SUMMED_ROWS, "COLUMNS": bias.SUMMED_COLUMNS, "STEPS": 2}
    found["sum_rows"] = compiled(bias.sum_rows, types, constants, arch, ["matrix", "out", "columns"], num_warps=4)
    for flat in (False, True):
        grid = {"FLAT": flat}
        for kernel in (kept_values.keep, kept_values.spread):
            pointers = ("matrix", "codes", "values") if kernel is kept_values.keep else ("values", "codes", "matrix")
            types = dict.fromkeys(pointers, "*i16") | {"rows": "i32", "groups": "i32"}
            constants = {"ROWS": kept_values.ROWS, "GROUPS": kept_values.GROUPS} | grid
            name = f"{kernel.__name__}{' flat' * flat}"
            found[name] = compiled(kernel, types, constants, arch, [*pointers, "rows", "groups"], num_warps=4)
        types = {"packed": "*u8", "out": "*i64", "rows": "i32", "columns": "i32"}
        constants = {"BITS": BITS, "ROWS": unpack.ROWS, "GROUPS": unpack.GROUPS, "PAIR": tl.int32} | grid
        name, divisible = f"unpack{' flat' * flat}", ["packed", "out", "columns"]
        found[name] = compiled(unpack.unpack, types, constants, arch, [*divisible, "rows"], num_warps=4)
        found[f"{name}, one row"] = compiled(
            unpack.unpack, types, constants | {"rows": 1}, arch, divisible, num_warps=4
        )
        types, constants = types | {"out": "*i32"}, constants | {"BITS": SM90_8BIT.bits, "PAIR": tl.int16}
        found[f"unpack8{' flat' * flat}"] = compiled(
            unpack.unpack, types, constants, arch, [*divisible, "rows"], num_warps=4
        )
        types = {"matrix": "*bf16", "bias": "*bf16", "rows": "i32", "columns": "i32"}
        constants, divisible = {"ROWS": bias.ROWS, "COLUMNS": bias.COLUMNS} | grid, ["matrix", "bias", "columns"]
        found[f"add_bias{' flat' * flat}"] = compiled(bias.add_bias, types, constants, arch, divisible, num_warps=4)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
