"""Which compiled kernels are started without Triton, on made-up ones; test_compile.py has the real ones."""

from types import SimpleNamespace

import pytest

from semisparse.kernels.compiled import CompiledLaunch, compiled_launch, parameter_count

PTX = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1,
    .param .u32 kernel_param_2,
    .param .u64 .ptr .global .align 1 kernel_param_3,
    .param .u64 .ptr .global .align 1 kernel_param_4
)
.reqntid 128
{
    ld.param.b32 %r1, [kernel_param_2];
}
"""
SIGNATURE = {"a": "*fp32", "absent": "constexpr", "b": "*u8", "rows": "i32", "one": "constexpr", "BLOCK": "constexpr"}
METADATA = {
    "num_warps": 4, "num_ctas": 1, "shared": 512, "launch_cooperative_grid": False, "launch_pdl": False,
    "global_scratch_size": 0, "profile_scratch_size": 0, "target": SimpleNamespace(warp_size=32),
}  # fmt: skip
GRID, POINTERS, SIZES = (2, 3, 1), ("a", None, "b"), (48, 1)


def made(signature: dict[str, str] = SIGNATURE, ptx: str = PTX, **metadata: object) -> SimpleNamespace:
    return SimpleNamespace(
        metadata=SimpleNamespace(**METADATA | metadata),
        src=SimpleNamespace(signature=signature),
        asm={"ptx": ptx},
        function=77,
    )


def test_what_is_folded_is_left_out_and_scratch_comes_last() -> None:
    kernel = made()
    parameters = ((0, 0), (2, 0), (-1, 48), (-1, 0), (-1, 0))
    assert compiled_launch(kernel, GRID, POINTERS, SIZES) == CompiledLaunch(kernel, 77, GRID, 128, 512, parameters)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_ctas", 2), ("launch_cooperative_grid", True), ("launch_pdl", True), ("global_scratch_size", 16),
     ("profile_scratch_size", 1)],
)  # fmt: skip
def test_what_a_plain_launch_does_not_do_is_left_to_triton_and_named(name: str, value: object) -> None:
    assert compiled_launch(made(**{name: value}), GRID, POINTERS, SIZES) == f"it has {name}={value}"


def test_metadata_that_a_version_of_triton_lacks_is_none() -> None:
    kernel = made(profile_scratch_size=None)
    del kernel.metadata.launch_pdl
    assert isinstance(compiled_launch(kernel, GRID, POINTERS, SIZES), CompiledLaunch)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"b": "constexpr"}, "its code takes 5 parameters, and 4 were expected"),
        ({"one": "i32"}, "its code takes 5 parameters, and 6 were expected"),
        ({"absent": "*i16"}, "argument 1 is *i16, not the pointer that was given"),
        ({"b": "i32"}, "argument 2 is i32, not the pointer that was given"),
        ({"rows": "fp32"}, "argument 3 is fp32"),
        ({"rows": "u64"}, "argument 3 is u64"),
        ({"a": "nvTmaDesc"}, "argument 0 is nvTmaDesc, not the pointer that was given"),
        ({"BLOCK": "i32"}, "a constant was not folded"),
    ],
)
def test_arguments_that_are_not_as_expected_are_left_to_triton_and_named(change: dict[str, str], reason: str) -> None:
    assert compiled_launch(made(SIGNATURE | change), GRID, POINTERS, SIZES) == reason


@pytest.mark.parametrize("ptx", ["", "no entry", PTX.replace("kernel_param_1,", "kernel_param_1, .param .u32 more,")])
def test_code_with_another_number_of_parameters_is_left_to_triton(ptx: str) -> None:
    count = 6 if "more" in ptx else 0
    assert parameter_count(ptx) == count
    reason = f"its code takes {count} parameters, and 5 were expected"
    assert compiled_launch(made(ptx=ptx), GRID, POINTERS, SIZES) == reason
