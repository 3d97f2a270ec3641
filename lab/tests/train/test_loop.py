import gc
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lab.tests.toys import MODEL, TRAIN, OverflowingTask, kept_per_group, sparse_row, toy_data, train_toy
from semisparse import SparseSchedule
from semisparse.errors import ConfigError, NoLayerMatchedError
from semisparse.metrics import MaskMetrics
from semisparse_lab.experiment import sparsify_model
from semisparse_lab.models.vit import build_model
from semisparse_lab.studies import three_runs
from semisparse_lab.tasks.classification import Augmentation, ImageClassification, augment, classification_scores
from semisparse_lab.train import measure
from semisparse_lab.train.config import TrainConfig, learning_rate, resolve_device
from semisparse_lab.train.loop import fit, phase_spans
from semisparse_lab.train.results import PeakMemory

STEPS = 5  # an epoch of the 88 toy training images in batches of 16
ROWS = three_runs.rows(0.7)
DENSE, _, FULLY_SPARSE = ROWS


def toy_task(augmentation: Augmentation | None = None) -> ImageClassification:
    return ImageClassification(toy_data(), augmentation)


def numbers(run) -> object:
    """All of a result but its timings and memory."""
    result = run.result
    return result.epochs, result.test, [(phase.kind, phase.start, phase.end) for phase in result.phases]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_the_same_seed_gives_identical_numbers_and_another_seed_does_not(row):
    task = toy_task(Augmentation())
    first, second = train_toy(row, task, TRAIN), train_toy(row, task, TRAIN)
    assert numbers(first) == numbers(second)
    states = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert numbers(train_toy(row, task, replace(TRAIN, seed=1))) != numbers(first)


def test_the_dense_run_is_bit_for_bit_that_of_a_model_never_swapped():
    task = toy_task(Augmentation())
    plain = build_model(MODEL, TRAIN.seed)
    result = fit(plain, task, TRAIN, name="dense")
    run = train_toy(DENSE, task, TRAIN)
    # Only a swapped layer has a mask to follow.
    assert result.epochs == tuple(replace(record, flip_rate=None, kept_magnitude=None) for record in run.result.epochs)
    assert result.test == run.result.test
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in run.model.state_dict().items())


def test_every_configuration_sees_the_same_batches():
    seen = []

    class Recorder(ImageClassification):
        def loss(self, forward, batch):
            seen[-1].append(batch)
            return super().loss(forward, batch)

    for row in three_runs.rows(0.5):
        seen.append([])
        train_toy(row, Recorder(toy_data(), Augmentation()), TRAIN)
    for other in seen[1:]:
        assert len(other) == len(seen[0]) == 3 * STEPS
        assert all(
            torch.equal(a, b)
            for mine, yours in zip(other, seen[0], strict=True)
            for a, b in zip(mine, yours, strict=True)
        )


def test_phases_follow_the_plan_and_the_model_ends_plain():
    expected = {
        "dense": [("dense", 0, 15)],
        "sparse-then-dense": [("sparse", 0, 10), ("dense", 10, 15)],
        "fully-sparse": [("sparse", 0, 15)],
    }
    for row in ROWS:
        run = train_toy(row, toy_task(), TRAIN)
        assert [(phase.kind, phase.start, phase.end) for phase in run.result.phases] == expected[row.slug]
        assert run.weights == ("masked" if row.slug == "fully-sparse" else "dense")
        assert run.result.steps == 15 and run.result.skipped_steps == 0
        assert [record.step for record in run.result.epochs] == [5, 10, 15]
        linears = [module for module in run.model.modules() if isinstance(module, nn.Linear)]
        assert {type(module) for module in linears} == {nn.Linear}


def test_only_the_fully_sparse_run_leaves_pruned_weights_and_they_score_what_was_measured():
    task = toy_task()
    for row in ROWS:
        run = train_toy(row, task, TRAIN)
        with torch.no_grad():
            assert classification_scores(run.model, task.data.test) == run.result.test
        weight = run.model.blocks[0].mlp.fc1.weight.detach()
        if row == FULLY_SPARSE:
            assert kept_per_group(weight).max() == 2 and kept_per_group(weight.T).max() == 2
        else:
            assert kept_per_group(weight).max() == 4
        assert kept_per_group(run.model.blocks[0].attn.qkv.weight.detach()).max() == 4


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_every_epoch_has_flip_rate_and_kept_magnitude_of_its_last_step(row, monkeypatch):
    masks, kept = [], []

    class Recorder(MaskMetrics):
        def update(self):
            pruned = [layer.pruned_weight().detach() for layer in self._layers.values()]
            masks.append([weight != 0 for weight in pruned])
            shares = [
                weight.abs().sum() / layer.weight.detach().abs().sum()
                for weight, layer in zip(pruned, self._layers.values(), strict=True)
            ]
            kept.append(sum(share.item() for share in shares) / len(shares))
            return super().update()

    monkeypatch.setattr(measure, "MaskMetrics", Recorder)
    run = train_toy(row, toy_task(), TRAIN)
    assert len(masks) == run.result.steps == 3 * STEPS
    for epoch, record in enumerate(run.result.epochs, start=1):
        before, after = masks[epoch * STEPS - 2], masks[epoch * STEPS - 1]
        flips = sum((a != b).sum().item() for a, b in zip(before, after, strict=True))
        assert record.flip_rate == pytest.approx(flips / sum(mask.numel() for mask in after))
        assert record.kept_magnitude == pytest.approx(kept[epoch * STEPS - 1]) and record.kept_magnitude < 1
    assert any(record.flip_rate > 0 for record in run.result.epochs)


def test_skipped_steps_are_not_followed():
    task = OverflowingTask(toy_data(), frozenset(range(STEPS)))
    config = replace(TRAIN, precision="fp16")
    records = train_toy(FULLY_SPARSE, task, config).result.epochs
    assert records[0].kept_magnitude is None
    assert records[0].flip_rate is None and records[1].flip_rate is not None


def test_training_learns_the_toy():
    for row in ROWS:
        result = train_toy(row, toy_task(), replace(TRAIN, epochs=12)).result
        assert result.epochs[-1].train_loss < result.epochs[0].train_loss
        assert result.test.accuracy > 0.5  # chance is 0.25


@pytest.mark.parametrize("overflows", [{3}, {0, 1, 12}])
def test_a_step_that_the_scaler_skips_does_not_move_the_schedule(overflows):
    assert torch.amp.GradScaler("cpu").is_enabled()
    model = build_model(MODEL, seed=0)
    sparsify_model(model, "mlp")
    schedule = SparseSchedule.sparse_then_dense(model, 15, 0.4)
    task = OverflowingTask(toy_data(), frozenset(overflows))
    result = fit(model, task, replace(TRAIN, precision="fp16"), schedule)
    # The scale starts at 2**16, so fp16 gradients may overflow by themselves as well; whichever step is skipped, the
    # sparse phase is 6 applied steps long.
    assert result.skipped_steps >= len(overflows)
    assert schedule.applied_steps == 15 - result.skipped_steps
    early = len([step for step in overflows if step < 6])
    assert result.phases[0].kind == "sparse" and result.phases[0].end >= 6 + early
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_without_overflow_fp16_skips_nothing_more_than_the_forced_steps():
    def skipped(overflows: set[int]) -> int:
        model = build_model(MODEL, seed=0)
        sparsify_model(model, "mlp")
        schedule = SparseSchedule.sparse_then_dense(model, 15, 0.4)
        task = OverflowingTask(toy_data(), frozenset(overflows))
        return fit(model, task, replace(TRAIN, precision="fp16"), schedule).skipped_steps

    assert skipped({7, 9}) == skipped(set()) + 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_runs_train_with_fp32_weights(precision):
    run = train_toy(FULLY_SPARSE, toy_task(), replace(TRAIN, precision=precision))
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert math.isfinite(run.result.test.loss)
    assert run.result.epochs != train_toy(FULLY_SPARSE, toy_task(), TRAIN).result.epochs


def test_progress_is_reported_after_each_step_and_each_epoch():
    reports = []
    run = train_toy(sparse_row(0.5), toy_task(), TRAIN, on_progress=reports.append)
    steps = [report for report in reports if report.record is None]
    assert [report.step for report in steps] == list(range(1, 16))
    assert [report.phase for report in steps] == ["sparse"] * 8 + ["dense"] * 7
    assert {(report.name, report.total_steps) for report in reports} == {("toy", 15)}
    assert tuple(report.record for report in reports if report.record) == run.result.epochs


def test_wrap_is_what_trains_while_scores_come_from_the_model():
    calls = []

    def wrap(model):
        def forward(images):
            calls.append(model.training)
            return model(images)

        return forward

    task = toy_task()
    wrapped = train_toy(DENSE, task, TRAIN, wrap=wrap)
    assert calls == [True] * 15
    assert numbers(wrapped) == numbers(train_toy(DENSE, task, TRAIN))


def test_an_unknown_layer_is_refused_with_the_closest_names():
    with pytest.raises(NoLayerMatchedError, match=r"'mpl'.*blocks\.0\.mlp"):
        train_toy(DENSE, toy_task(), replace(TRAIN, layers="mpl"))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="batch_size=89 exceeds the 88 training images"):
        train_toy(DENSE, toy_task(), replace(TRAIN, batch_size=89))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 10**12}, r"epochs=1000000000000 must be at most 1000000"),
        ({"epochs": 10**5000}, "epochs=<int that is too long to show> must be at most 1000000"),
        ({"epochs": math.nan}, "epochs=nan"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be at most 18446744073709551615"),
        ({"seed": 0.0}, r"seed=0\.0"),
        ({"lr": 10**400}, "lr=10+"),
        ({"lr": 1e308}, r"lr=1e\+308 must be a positive number, at most 1e\+30"),
        ({"weight_decay": math.inf}, "weight_decay=inf must lie between 0 and"),
        ({"weight_decay": 1e300}, "weight_decay="),
        ({"clip": math.inf}, "clip=inf must be a number, 0 or more"),
        ({"clip": math.nan}, "clip=nan"),
        ({"clip": 10**5000}, "clip=<int"),
        ({"layers": None}, "layers=None"),
        ({"layers": ""}, "layers=''"),
        ({"device": None}, "device=None"),
        ({"device": ["cpu"]}, "device="),
        ({"epochs": 2.5}, "epochs=2.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"seed": -1}, "seed=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"lr": "a"}, "lr='a'"),
        ({"clip": "a"}, "clip='a'"),
        ({"betas": None}, "betas=None"),
        ({"betas": (0.9, "a")}, "betas="),
        ({"warmup_fraction": None}, "warmup_fraction=None"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"warmup_fraction": 1.1}, "warmup_fraction=1.1"),
        ({"hold_fraction": 0.91}, "hold_fraction=0.91"),
        ({"hold_fraction": -0.1}, "hold_fraction=-0.1"),
        ({"precision": "fp8"}, "'fp32', 'bf16', 'fp16'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "meta"}, "device='meta'"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
    ],
)
def test_settings_outside_their_range_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(TRAIN, **changes)


@pytest.mark.parametrize(
    "changes", [{"seed": 2**64 - 1}, {"lr": 1e30}, {"lr": 1e30, "weight_decay": 1e6}, {"lr": 1e30, "clip": 1e300}]
)
def test_the_largest_settings_train_and_end(changes):
    run = train_toy(FULLY_SPARSE, toy_task(), replace(TRAIN, epochs=1, **changes))
    assert run.result.diverged is ("lr" in changes)


def test_auto_is_a_device_that_is_there():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_learning_rate_rises_linearly_then_falls_to_zero_along_a_cosine():
    config = TrainConfig(lr=2.0, warmup_fraction=0.2)
    assert [learning_rate(config, step, 10) for step in (0, 1, 2)] == pytest.approx([1.0, 2.0, 2.0])
    assert learning_rate(config, 6, 10) == pytest.approx(1.0)
    assert learning_rate(config, 10, 10) == pytest.approx(0.0)
    assert learning_rate(replace(config, warmup_fraction=0.0), 0, 10) == 2.0


def test_learning_rate_is_held_between_warm_up_and_cosine():
    config = TrainConfig(lr=2.0, warmup_fraction=0.2, hold_fraction=0.4)
    assert [learning_rate(config, step, 10) for step in range(7)] == pytest.approx([1.0] + 6 * [2.0])
    assert learning_rate(config, 8, 10) == pytest.approx(1.0)
    assert learning_rate(config, 10, 10) == pytest.approx(0.0)
    whole = replace(config, hold_fraction=0.8)
    assert [learning_rate(whole, step, 10) for step in (2, 9)] == [2.0, 2.0]


def test_phase_spans_carry_the_median_after_warm_up():
    warm_up, steady = [9.0] * measure.WARM_UP_STEPS, [float(i) for i in range(1, measure.WARM_UP_STEPS + 2)]
    long = len(warm_up) + len(steady)
    products = [4] * long + [0, 0, 1]
    spans = phase_spans(["sparse"] * long + ["dense"] * 3, [*warm_up, *steady, 5.0, 7.0, 8.0], products)
    assert [(span.kind, span.start, span.end, span.seconds_per_step, span.sparse_products) for span in spans] == [
        ("sparse", 0, long, 6.0, 4 * long),
        ("dense", long, long + 3, 7.5, 1),  # a phase that short leaves out its first half
    ]


def test_seconds_per_step_of_two_phases_are_weighted_by_their_steps():
    run = train_toy(sparse_row(0.5), toy_task(), TRAIN)
    sparse, dense = run.result.phases
    assert sparse.seconds_per_step > 0 and dense.seconds_per_step > 0
    expected = (8 * sparse.seconds_per_step + 7 * dense.seconds_per_step) / 15
    assert run.result.seconds_per_step == pytest.approx(expected)


def test_peak_memory_of_a_process_sees_a_large_allocation_that_is_gone_again():
    for mebibytes in (64, 256, 768):  # what the system takes from the process meanwhile may hide a small one
        gc.collect()  # memory of earlier tests that is freed in between would hide it, too
        meter = measure.MemoryMeter(torch.device("cpu"))
        before = meter.peak()
        if before.bytes is None:
            assert before.kind == "not available on this system"
            return
        block = torch.ones(mebibytes * 2**20 // 4)
        del block
        after = meter.peak()
        if after.bytes - before.bytes > mebibytes * 2**19:
            break
    assert after.bytes - before.bytes > mebibytes * 2**19
    assert measure.MemoryMeter(torch.device("cpu")).peak().bytes < meter.peak().bytes + 2**20
    assert before.kind == "resident memory of the whole process"


def test_memory_that_cannot_be_read_is_none_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert measure.MemoryMeter(torch.device("cpu")).peak() == PeakMemory(None, "not available on this system")


def test_augmentation_without_draws_changes_nothing_and_a_shift_moves_pixels():
    images = torch.rand(3, 1, 8, 8)
    same = augment(images, torch.zeros(3, 4), Augmentation())
    torch.testing.assert_close(same, images)
    one_pixel = torch.tensor([0.0, 0.0, 1.0, 0.0]).repeat(3, 1)
    moved = augment(images, one_pixel, Augmentation(shift=1 / 8))
    torch.testing.assert_close(moved[..., :-1], images[..., 1:])
    torch.testing.assert_close(moved[..., -1], images.amin().expand(3, 1, 8))


def test_half_of_the_images_are_mirrored_and_whole_pixels_stay_sharp():
    images = torch.rand(2, 1, 8, 8)
    still = Augmentation(shift=0, rotation=0, scale=0, flip=True)
    mirrored = augment(images, torch.tensor([[0.0, 0, 0, 0, -0.5], [0.0, 0, 0, 0, 0.5]]), still)
    torch.testing.assert_close(mirrored[0], images[0].flip(-1))
    torch.testing.assert_close(mirrored[1], images[1])
    whole = Augmentation(shift=1 / 8, rotation=0, scale=0, whole_pixels=True)
    draws = torch.tensor([[0.0, 0, 0.7, 0.3], [0.0, 0, -0.2, -0.9]])  # parts of a pixel: 1 and 0, 0 and -1
    moved = augment(images, draws, whole)
    torch.testing.assert_close(moved[0, :, :, :-1], images[0, :, :, 1:])
    torch.testing.assert_close(moved[1, :, 1:], images[1, :, :-1])
    assert still.draws == 5 and whole.draws == 4


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_same_loop_runs_on_cuda(precision):
    config = replace(TRAIN, device="cuda", precision=precision)
    task = ImageClassification(toy_data("cuda"), Augmentation())
    for row in three_runs.rows(0.5):
        result = train_toy(row, task, config).result
        assert math.isfinite(result.test.loss) and result.seconds_per_step > 0
        assert result.peak_memory.kind == "allocated on the GPU" and result.peak_memory.bytes > 0
