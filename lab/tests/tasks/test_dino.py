import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lab.tests.toys import toy_data
from semisparse import recipes
from semisparse.errors import ConfigError, NoLayerMatchedError, ShapeError
from semisparse.nn import SemiSparseLinear
from semisparse_lab.experiment import Row, sparsify_model, train_row
from semisparse_lab.models.dino import DinoConfig, DinoHead, build_student
from semisparse_lab.models.vit import ViTConfig
from semisparse_lab.tasks.dino import DinoTask, crops, dino_loss
from semisparse_lab.tasks.probes import knn_votes, linear_probe
from semisparse_lab.train.capture import compiled_blocks
from semisparse_lab.train.config import TrainConfig

VIT = ViTConfig(image_size=8, patch_size=2, width=16, depth=1, heads=2)
DINO = DinoConfig(
    out_dim=12, hidden=16, bottleneck=8, local_views=3, local_size=4, teacher_momentum=0.75, teacher_temperature=0.04,
    global_scale=(0.5, 1.0), local_scale=(0.15, 0.5), brightness=0.4, contrast=0.4, blur=0.2,
)  # fmt: skip
VIEWS = 2 + DINO.local_views


def toy_task(config: DinoConfig = DINO, seed: int = 0) -> DinoTask:
    return DinoTask(toy_data(), build_student(VIT, config, seed), config)


def first_batch(task: DinoTask, seed: int = 0):
    return next(task.batches(16, torch.Generator().manual_seed(seed)))


def draw(count: int, views: int, **fixed: float) -> torch.Tensor:
    """Random draws with some of them fixed; of the rest 0.5 leaves brightness and contrast alone."""
    draws = torch.rand(count, views, 7, generator=torch.Generator().manual_seed(1))
    for name, value in fixed.items():
        draws[..., ("area", "x", "y", "flip", "brightness", "contrast", "blur").index(name)] = value
    return draws


def test_views_stay_in_the_range_of_the_images_and_depend_on_the_draws_alone():
    task = toy_task(replace(DINO, brightness=1.0, contrast=1.0, blur=0.5))
    images, draws = first_batch(task)
    large, small = task.views(images, draws)
    assert large.shape == (2 * 16, 1, 8, 8) and small.shape == (3 * 16, 1, 4, 4)
    slack = 1e-6 * float(images.abs().max())  # normalising and back
    low, high = task.data.train.images.min() - slack, task.data.train.images.max() + slack
    for views in (large, small):
        assert low <= views.min() and views.max() <= high
        assert len(views.flatten(1).unique(dim=0)) == len(views)
    for again, views in zip(task.views(images, draws), (large, small), strict=True):
        assert torch.equal(again, views)


def test_a_view_of_everything_is_the_image_or_its_mirror():
    images = torch.rand(5, 1, 8, 8)
    for flip, expected in ((0.9, images), (0.1, images.flip(3))):
        draws = draw(5, 2, flip=flip, brightness=0.5, contrast=0.5, blur=0.99)
        views = crops(images, draws, (1.0, 1.0), 8, DINO)
        torch.testing.assert_close(views, expected.repeat(2, 1, 1, 1))


def test_a_crop_lies_where_the_draws_say():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    for x, y, column, row in ((0.0, 0.0, 0, 0), (1.0, 0.0, 4, 0), (0.0, 1.0, 0, 4), (0.5, 0.5, 2, 2)):
        draws = draw(1, 1, x=x, y=y, flip=0.9, brightness=0.5, contrast=0.5, blur=0.99)
        for ramp, first, vector in ((columns, column, torch.ones(4, 1)), (rows, row, torch.ones(1, 4))):
            view = crops(ramp.view(1, 1, 8, 8) / 8, draws, (0.25, 0.25), 4, DINO)[0, 0]
            line = torch.arange(first, first + 4) / 8
            torch.testing.assert_close(view, vector * (line[None, :] if ramp is columns else line[:, None]))


def test_brightness_contrast_and_blur():
    images = torch.full((1, 1, 4, 4), 0.5)
    brighter = crops(images, draw(1, 1, brightness=1.0, contrast=0.0, blur=0.0), (0.5, 1.0), 4, DINO)
    torch.testing.assert_close(brighter, images * 1.4)  # a flat image has neither contrast nor anything to blur
    dot = torch.zeros(1, 1, 5, 5)
    dot[0, 0, 2, 2] = 0.9
    still = {"flip": 0.9, "brightness": 0.5, "contrast": 0.5}
    blurred = crops(dot, draw(1, 1, **still, blur=0.0), (1.0, 1.0), 5, DINO)
    assert blurred[0, 0, 1:4, 1:4].allclose(torch.tensor(0.1)) and blurred.sum() < 1
    flat = crops(dot, draw(1, 1, flip=0.9, brightness=0.5, contrast=0.0, blur=0.99), (1.0, 1.0), 5, DINO)
    torch.testing.assert_close(flat, torch.lerp(dot.mean().expand(dot.shape), dot, 0.6))


def test_the_loss_is_that_of_a_loop_over_all_pairs():
    torch.manual_seed(0)
    student, teacher, center = torch.randn(VIEWS, 6, 12), torch.randn(2, 6, 12), torch.randn(12)
    losses = []
    for i in range(2):
        for j in range(VIEWS):
            if i != j:
                for n in range(6):
                    target = F.softmax((teacher[i, n] - center) / DINO.teacher_temperature, dim=0)
                    losses.append(-(target * F.log_softmax(student[j, n] / DINO.student_temperature, dim=0)).sum())
    assert len(losses) == 2 * (VIEWS - 1) * 6
    torch.testing.assert_close(dino_loss(student, teacher, center, DINO), torch.stack(losses).mean())


def test_the_task_gives_the_teacher_the_large_views_and_the_student_all():
    task = toy_task()
    images, draws = first_batch(task)
    large, small = task.views(images, draws)
    outputs = [*task.student(large).split(16), *task.student(small).split(16)]
    task.center.copy_(torch.linspace(-0.1, 0.1, 12))
    start = task.center.clone()
    expected = dino_loss(torch.stack(outputs), torch.stack(outputs[:2]), start, DINO)
    # At the first step the teacher equals the student.
    torch.testing.assert_close(task.loss(task.student, (images, draws)), expected)
    mean = torch.cat(outputs[:2]).mean(dim=0)
    torch.testing.assert_close(task.center, 0.9 * start + 0.1 * mean)
    task.loss(task.student, (images, draws))
    torch.testing.assert_close(task.center, 0.81 * start + 0.19 * mean)


def test_the_teacher_follows_the_student_and_gets_no_gradient():
    task = toy_task()
    optimizer = torch.optim.SGD(task.student.parameters(), lr=0.1)
    teacher = {name: value.clone() for name, value in task.teacher.named_parameters()}
    for step in range(3):
        before = {name: value.detach().clone() for name, value in task.student.named_parameters()}
        loss = task.loss(task.student, first_batch(task, step))
        for name, value in teacher.items():
            expected = 0.75 * value + 0.25 * before[name]
            torch.testing.assert_close(dict(task.teacher.named_parameters())[name], expected)
            teacher[name] = expected
        optimizer.zero_grad()
        loss.backward()
        assert all(value.grad is None and not value.requires_grad for value in task.teacher.parameters())
        assert all(value.grad is not None for value in task.student.parameters())
        optimizer.step()
    student = dict(task.student.named_parameters())
    assert any(not torch.equal(value, student[name]) for name, value in task.teacher.named_parameters())


def test_only_the_students_mlps_become_sparse_and_its_dense_weights_go_on_to_the_teacher():
    task = toy_task()
    report = sparsify_model(task.student, "mlp", recipes.dinov2().config)
    sparse = [name for name, module in task.student.named_modules() if isinstance(module, SemiSparseLinear)]
    assert sparse == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"] and len(report.swapped) == 2
    assert all(type(m) is nn.Linear for m in task.teacher.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        task.student.blocks[0].mlp.fc1.weight.fill_(1.0)
    before = task.teacher.blocks[0].mlp.fc1.weight.clone()
    task.loss(task.student, first_batch(task)).backward()
    torch.testing.assert_close(task.teacher.blocks[0].mlp.fc1.weight, 0.75 * before + 0.25)
    with pytest.raises(ConfigError, match="build the task first"):
        DinoTask(task.data, task.student, DINO)
    with pytest.raises(NoLayerMatchedError):
        sparsify_model(build_student(VIT, DINO, 0), "head")


def test_batches_depend_on_the_generator_alone():
    task, other = toy_task(), toy_task(seed=1)
    for a, b in zip(first_batch(task), first_batch(other), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first_batch(task, 1)[1], first_batch(task)[1])
    assert len(list(task.batches(16, torch.Generator()))) == task.steps_per_epoch(16) == 5
    with pytest.raises(ConfigError, match="exceeds"):
        task.steps_per_epoch(1000)


def test_the_student_takes_both_sizes_and_refuses_others():
    student = build_student(VIT, DINO, 0)
    with torch.no_grad():
        student.positions.fill_(3.0)
    # Interpolated equal positions are equal positions, so an image of one colour gives the same at any size.
    large, small = (student.features(torch.full((2, 1, side, side), 0.5)) for side in (8, 4))
    assert large.shape == (2, 16, 16) and small.shape == (2, 4, 16)
    torch.testing.assert_close(large[:, :4], small)
    assert student(torch.rand(2, 1, 4, 4)).shape == (2, 12)
    for shape in ((2, 1, 5, 5), (2, 1, 4, 8), (2, 3, 4, 4), (1, 4, 4), (2, 1, 0, 0)):
        with pytest.raises(ShapeError, match="images has"):
            student(torch.rand(shape))


def test_initial_weights_depend_on_the_seed_alone():
    torch.rand(1)
    first, second, other = (build_student(VIT, DINO, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.prototypes"], other["head.prototypes"])


def test_the_head_gives_fp32_cosines_under_autocast_too():
    head = DinoHead(16, DINO)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        cosines = head(x)
    hidden = head.fc3(F.gelu(head.fc2(F.gelu(head.fc1(x)))))
    expected = F.cosine_similarity(hidden[:, None], head.prototypes[None], dim=2)
    assert cosines.dtype is torch.float32 and cosines.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(head(x), expected)


def test_knn_votes_are_those_of_a_loop():
    torch.manual_seed(0)
    memory, queries = torch.randn(30, 5), torch.randn(7, 5)
    labels = torch.randint(4, (30,))
    votes = knn_votes(memory, labels, queries, 4, k=6)
    for query, shares in zip(queries, votes, strict=True):
        cosines = [float(query @ m / (query.norm() * m.norm())) for m in memory]
        nearest = sorted(range(30), key=lambda i: -cosines[i])[:6]
        weights = [math.exp(cosines[i] / 0.07) for i in nearest]
        expected = [sum(w for i, w in zip(nearest, weights, strict=True) if labels[i] == c) for c in range(4)]
        torch.testing.assert_close(shares, torch.tensor(expected) / sum(weights))
    assert knn_votes(memory[:3], labels[:3], queries, 4).shape == (7, 4)  # fewer than k


def test_a_linear_probe_learns_what_a_line_separates():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    centres = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    features = centres[labels] + 0.5 * torch.randn(300, 2)
    train, test = (features[:200], labels[:200]), (features[200:], labels[200:])
    assert linear_probe(train, test, 3) == 1.0
    assert linear_probe((train[0], train[1].roll(1)), test, 3) == 0.0  # so it read the labels


def test_scores_are_those_of_the_students_tokens():
    task, other = toy_task(), build_student(VIT, DINO, 7)
    train, test = task.data.train, task.data.test

    def accuracy(memory: torch.Tensor, queries: torch.Tensor) -> float:
        votes = knn_votes(memory.flatten(1), train.labels, queries.flatten(1), 4)
        return (votes.argmax(dim=1) == test.labels).float().mean().item()

    with torch.no_grad():
        tokens, queries = task.student.features(train.images), task.student.features(test.images)
        assert task.test(task.student).accuracy == pytest.approx(accuracy(tokens, queries))
        pooled = accuracy(tokens.mean(dim=1), queries.mean(dim=1))
        before = accuracy(other.features(train.images), other.features(test.images))
    more = task.frozen_scores("fp32", other)
    assert more["knn_accuracy"] == pytest.approx(100 * task.test(task.student).accuracy)
    assert more["pooled_knn_accuracy"] == pytest.approx(100 * pooled)
    assert more["untrained_knn_accuracy"] == pytest.approx(100 * before)
    assert more["raw_pixel_knn_accuracy"] == 100 and 0 < more["feature_std"] <= 1
    assert 0 <= more["linear_accuracy"] <= 100


@pytest.mark.parametrize("fraction", [0.0, 0.6, 1.0])
def test_a_run_follows_its_phases_repeats_bit_for_bit_and_ends_plain(fraction):
    task = toy_task()
    row = Row("row", "row", recipes.dinov2(sparse_fraction=fraction))
    config = TrainConfig(epochs=2, batch_size=16, lr=3e-3, clip=3.0)
    start = copy.deepcopy(task.student.state_dict())
    result = train_row(row, task.student, task, config).result
    kinds = [(phase.kind, phase.end) for phase in result.phases]
    assert kinds == {0.0: [("dense", 10)], 0.6: [("sparse", 6), ("dense", 10)], 1.0: [("sparse", 10)]}[fraction]
    assert all(type(m) is nn.Linear for m in task.student.modules() if isinstance(m, nn.Linear))
    assert task.test(task.student) == result.test  # what was scored is what is left
    again = toy_task()
    assert all(torch.equal(value, start[name]) for name, value in again.student.state_dict().items())
    repeated = train_row(row, again.student, again, config).result
    assert (repeated.epochs, repeated.test) == (result.epochs, result.test)


@pytest.mark.parametrize(
    "wrong",
    [{"out_dim": 0}, {"local_views": True}, {"blur": 1.5}, {"teacher_momentum": math.nan},
     {"teacher_temperature": 0.0}, {"global_scale": (0.5, 0.4)}, {"local_scale": (0.0, 0.4)}],
)  # fmt: skip
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DinoConfig(**wrong)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_take_both_sizes_and_give_the_same_loss():
    plain = toy_task()
    compiled = DinoTask(plain.data, build_student(VIT, DINO, 0), DINO, compiled_blocks)
    batch = first_batch(plain)
    for _ in range(2):
        a, b = plain.loss(plain.student, batch), compiled.loss(compiled_blocks(compiled.student), batch)
        torch.testing.assert_close(a, b)
