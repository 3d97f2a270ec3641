"""Self-supervised learning at small scale: DINO (arXiv 2104.14294).

The teacher is the moving average of the student's weights. The student sees two large and several small crops of each
image, the teacher the large ones. The student learns to predict the teacher's prototype of any other crop. Labels are
used for scores only.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semisparse import SemiSparseActivationLinear, SemiSparseLinear
from semisparse.errors import ConfigError
from semisparse_lab.data.images import Dataset, Split
from semisparse_lab.models.dino import DinoConfig, DinoStudent
from semisparse_lab.tasks.classification import ImageClassification
from semisparse_lab.tasks.probes import knn_votes, linear_probe
from semisparse_lab.tasks.task import Batch, Forward
from semisparse_lab.train.config import Precision, autocast
from semisparse_lab.train.results import Scores

GLOBAL_VIEWS = 2
_DRAWS = 7  # random numbers of one view
_VALIDATION_MEMORY = 10_000  # training images whose features classify the validation split, for speed
_CHUNK = 1000


def crops(images: Tensor, draws: Tensor, scale: tuple[float, float], size: int, config: DinoConfig) -> Tensor:
    """Random views of images, in fp32.

    Each view is a square anywhere inside the image, resized bilinearly; half of the views are mirrored. Brightness,
    contrast and blur follow.

    Args:
        images: (n, C, S, S), pixels from 0 to 1.
        draws: (n, views, 7), random numbers in [0, 1) that decide all of this.
        scale: Smallest and largest share of the area.
        size: Side of a view, in pixels.
        config: Strength of brightness, contrast and blur.

    Returns:
        (views * n, C, size, size), pixels from 0 to 1, view by view.
    """
    area, x, y, flip, brightness, contrast, blur = draws.transpose(0, 1).flatten(0, 1).unbind(1)
    side = (scale[0] + area * (scale[1] - scale[0])).sqrt()
    room, zero = 1 - side, torch.zeros_like(side)
    mirrored = torch.where(flip < 0.5, -side, side)
    rows = torch.stack([mirrored, zero, (2 * x - 1) * room, zero, side, (2 * y - 1) * room], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), [len(rows), images.shape[1], size, size], align_corners=False)
    views = F.grid_sample(images.repeat(draws.shape[1], 1, 1, 1), grid, padding_mode="border", align_corners=False)

    def each(value: Tensor) -> Tensor:
        return value.view(-1, 1, 1, 1)

    views = views * each(1 + config.brightness * (2 * brightness - 1))
    mean = views.mean(dim=(1, 2, 3), keepdim=True)
    views = torch.lerp(mean, views, each(1 + config.contrast * (2 * contrast - 1))).clamp(0, 1)
    smooth = F.avg_pool2d(views, 3, stride=1, padding=1, count_include_pad=False)
    return torch.where(each(blur) < config.blur, smooth, views)


def dino_loss(student: Tensor, teacher: Tensor, center: Tensor, config: DinoConfig) -> Tensor:
    """Mean cross-entropy over all pairs of a student's view and another view of the teacher, a scalar.

    Args:
        student: (views, n, out_dim); its first entries are for the teacher's views.
        teacher: (2, n, out_dim).
        center: (out_dim,).
        config: Its temperatures.
    """
    targets = ((teacher - center) / config.teacher_temperature).softmax(dim=-1)
    logs = (student / config.student_temperature).log_softmax(dim=-1)
    # The sum over all pairs needs no loop; pairs of a view with itself are subtracted.
    total = (targets.sum(dim=0) * logs.sum(dim=0)).sum() - (targets * logs[: len(targets)]).sum()
    return -total / (len(targets) * (len(logs) - 1) * student.shape[1])


class DinoTask(ImageClassification):
    """Task: DINO on the training images of data, scored by k-NN of the student's features (see knn_votes).

    A batch is (images, draws). loss makes the views from both; it draws no random numbers, so that it can be captured
    in a CUDA graph.

    Args:
        data: The images, on one device.
        student: The model that is trained; dense, on data's device. Its copy, the teacher, is not part of it
            and stays dense when the student's layers become sparse.
        config: Settings of the method.
        wrap: What the teacher's forward goes through, as in fit.

    Raises:
        ConfigError: student is sparse already.
    """

    def __init__(
        self,
        data: Dataset,
        student: DinoStudent,
        config: DinoConfig,
        wrap: Callable[[nn.Module], Forward] | None = None,
    ) -> None:
        if any(isinstance(module, (SemiSparseLinear, SemiSparseActivationLinear)) for module in student.modules()):
            raise ConfigError("student has semi-sparse layers, and so would its teacher; build the task first")
        super().__init__(data)
        self.student, self.config = student, config
        self.teacher = deepcopy(student).requires_grad_(False)
        self._teach = self.teacher if wrap is None else wrap(self.teacher)
        # A swap keeps Parameters, so these stay the student's.
        self._now: list[Tensor] = [parameter.detach() for parameter in student.parameters()]
        self._past: list[Tensor] = list(self.teacher.parameters())
        images = data.train.images
        self._low, self._high = images.amin(), images.amax()
        self.center = torch.zeros(config.out_dim, device=images.device)
        self._memory = data.train.sample(_VALIDATION_MEMORY)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """(images, draws) of one epoch. All random numbers are drawn on the CPU and moved once per epoch."""
        images = self.data.train.images
        views = GLOBAL_VIEWS + self.config.local_views
        order = torch.randperm(len(images), generator=generator).to(images.device)
        draws = torch.rand(len(images), views, _DRAWS, generator=generator).to(images.device)
        for step in range(self.steps_per_epoch(batch_size)):
            chosen = slice(step * batch_size, (step + 1) * batch_size)
            yield images[order[chosen]], draws[chosen]

    def views(self, images: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Large (2 * n, ...) and small (local_views * n, ...) views of images, view by view, normalised as they are."""
        # Autocast would compute the sampling positions in bf16.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            span = self._high - self._low
            pixels = (images - self._low) / span
            large = crops(pixels, draws[:, :GLOBAL_VIEWS], self.config.global_scale, images.shape[-1], self.config)
            small = crops(pixels, draws[:, GLOBAL_VIEWS:], self.config.local_scale, self.config.local_size, self.config)
            return large * span + self._low, small * span + self._low

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """dino_loss of one batch; updates the teacher by the student's weights before it, and the centre after it.

        Args:
            forward: The student.
            batch: Images and draws, as batches yields them.
        """
        torch._foreach_lerp_(self._past, self._now, 1 - self.config.teacher_momentum)
        large, small = self.views(*batch)
        count, out_dim = len(batch[0]), self.config.out_dim
        with torch.no_grad():
            teacher = self._teach(large).view(-1, count, out_dim)
        student = torch.cat([forward(large), forward(small)]).view(-1, count, out_dim)
        loss = dino_loss(student, teacher, self.center, self.config)
        self.center.lerp_(teacher.mean(dim=(0, 1)), 1 - self.config.center_momentum)
        return loss

    def validate(self, forward: Forward) -> Scores:
        """k-NN of the student's tokens on the validation split, among those of 10,000 training images.

        Two images are compared by the cosine between their tokens, concatenated.

        Args:
            forward: Not used; the student itself gives the tokens.

        Returns:
            The accuracy, and as loss the mean -log of the votes' share of the true class, which counts as at least
            1 / 1000.
        """
        return self._knn(self._memory, self.data.validation)

    def test(self, forward: Forward) -> Scores:
        """As validate, on the test split, among the tokens of all training images.

        Args:
            forward: Not used.
        """
        return self._knn(self.data.train, self.data.test)

    def frozen_scores(self, precision: Precision, untrained: DinoStudent) -> dict[str, float]:
        """Scores of the student as it is now, on the test split.

        Args:
            precision: Of the forward passes.
            untrained: A student to compare with.

        Returns:
            Accuracies in percent: "knn_accuracy", as test; "untrained_knn_accuracy", the same for untrained;
            "pooled_knn_accuracy", by the mean over the tokens; "linear_accuracy", of a linear_probe on that mean;
            "raw_pixel_knn_accuracy", by the images alone. Besides, "feature_std" of the means: 1 if the normalised
            means spread in all directions, 0 if all are the same.
        """
        train, test, classes = self.data.train, self.data.test, self.data.classes

        def tokens(student: DinoStudent) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), autocast(train.images.device, precision):
                return _features(student, train.images), _features(student, test.images)

        def knn(memory: Tensor, queries: Tensor) -> float:
            votes = knn_votes(memory, train.labels, queries, classes)
            return 100 * (votes.argmax(dim=1) == test.labels).float().mean().item()

        scores = {
            "untrained_knn_accuracy": knn(*tokens(untrained)),
            "knn_accuracy": knn(*(both := tokens(self.student))),
        }
        pooled, queries = (part.unflatten(1, (-1, self.student.config.width)).mean(dim=1) for part in both)
        spread = F.normalize(queries, dim=1).std(dim=0).square().sum().sqrt()
        return {
            **scores,
            "pooled_knn_accuracy": knn(pooled, queries),
            "linear_accuracy": 100 * linear_probe((pooled, train.labels), (queries, test.labels), classes),
            "raw_pixel_knn_accuracy": knn(train.images.flatten(1), test.images.flatten(1)),
            "feature_std": spread.item(),
        }

    def _knn(self, memory: Split, split: Split) -> Scores:
        features, queries = (_features(self.student, part.images) for part in (memory, split))
        votes = knn_votes(features, memory.labels, queries, self.data.classes)
        share = votes.gather(1, split.labels[:, None]).clamp(min=1e-3)
        return Scores(-share.log().mean().item(), (votes.argmax(dim=1) == split.labels).float().mean().item())


def _features(student: DinoStudent, images: Tensor) -> Tensor:
    """The tokens of each image in a row, (n, T * width)."""
    return torch.cat([student.features(part).flatten(1) for part in images.split(_CHUNK)])
