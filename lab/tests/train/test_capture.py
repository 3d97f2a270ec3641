"""Compiled blocks and graphed gradients give the training that plain calls give."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

from lab.tests.toys import MODEL, TRAIN, toy_data
from semisparse import recipes
from semisparse.errors import ConfigError
from semisparse_lab.experiment import Row, train_row
from semisparse_lab.models.vit import ViTConfig, build_model
from semisparse_lab.tasks.classification import ImageClassification
from semisparse_lab.train.capture import compiled_blocks
from semisparse_lab.train.loop import fit

# Raised inside torch's own compiler.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)

WIDE = ViTConfig(image_size=8, patch_size=4, width=64, depth=2, heads=2, classes=4)


def test_only_the_labs_models_have_blocks_to_compile() -> None:
    with pytest.raises(ConfigError, match="model=Linear"):
        compiled_blocks(nn.Linear(4, 4))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_needs_cuda_and_no_gradient_scaling(precision: str) -> None:
    config = replace(TRAIN, precision=precision)
    with pytest.raises(ConfigError, match=r"graph=True needs device='cuda'"):
        fit(build_model(MODEL, 0), ImageClassification(toy_data()), config, graph=True)


def test_compiled_blocks_compute_the_models_output() -> None:
    model, images = build_model(MODEL, 0), torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(compiled_blocks(model)(images), model(images))


@pytest.mark.gpu
@pytest.mark.parametrize("name", recipes.PRESETS)
def test_a_graphed_run_is_the_run_without_a_graph(name: str) -> None:
    """Bit for bit: the same kernels on the same numbers, whether started one by one or replayed."""
    task = ImageClassification(toy_data("cuda"))
    config = replace(TRAIN, device="cuda", precision="bf16", epochs=6, clip=1.0)
    row = Row(name, name, recipes.PRESETS[name](backend="cusparselt"))
    results = {}
    for graph in (False, True):
        model = build_model(WIDE, 0, "cuda")
        result = train_row(row, model, task, config, graph=graph).result
        results[graph] = (result.epochs, result.test), {k: v.cpu() for k, v in model.state_dict().items()}
        spans = [(phase.kind, phase.start, phase.end, phase.sparse_products) for phase in result.phases]
        assert spans == results.setdefault("spans", spans)
        assert all((products > 0) is (kind == "sparse") for kind, _, _, products in spans)
    assert results[False][0] == results[True][0]
    assert all(torch.equal(tensor, results[True][1][key]) for key, tensor in results[False][1].items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dinov2", "fst", "s_ste"])
def test_a_compiled_and_graphed_run_learns(name: str) -> None:
    task = ImageClassification(toy_data("cuda"))
    config = replace(TRAIN, device="cuda", precision="bf16", epochs=10)
    row = Row("half", "half", recipes.PRESETS[name](sparse_fraction=0.5, backend="cusparselt"))
    result = train_row(row, build_model(WIDE, 0, "cuda"), task, config, wrap=compiled_blocks, graph=True).result
    assert result.test.accuracy > 0.9


@pytest.mark.gpu
def test_a_finished_run_leaves_no_memory_behind() -> None:
    """Without waiting for the garbage collector: a graph that it frees during a later capture would break that one."""
    task = ImageClassification(toy_data("cuda"))
    config = replace(TRAIN, device="cuda", precision="bf16")
    row = Row("half", "half", recipes.sr_ste(sparse_fraction=0.5, backend="cusparselt"))
    used = []
    gc.disable()
    try:
        for _ in range(3):
            train_row(row, build_model(WIDE, 0, "cuda"), task, config, graph=True)
            used.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    assert used[2] == used[1]  # the first run also makes what the process keeps, workspaces of libraries say
