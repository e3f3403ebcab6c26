"""Data sets by name, from small ones that the test writes."""

import hashlib
import inspect
import json
import pickle
import struct

import numpy as np
import pytest
import torch
from pictures import cut_short, pixels, write_classes, write_images

pytest.importorskip("torchvision")

import torchvision

from limpq_ext.data.datasets import load_data
from limpq_ext.data.sources import DATA_SETS, TORCHVISION, canonical_name

COUNTS = {"cat": 10, "dog": 10, "eel": 20}


def test_folders_of_splits_are_taken_as_they_are(tmp_path):
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        write_classes(tmp_path / split, {"a": count, "b": count}, suffix=".jpg")
    data = load_data("imagefolder", root=tmp_path, image_size=8)
    assert data.record["splits"] == {"train": 12, "val": 6, "test": 4}
    assert data.record["carved_from_train"] == {}
    json.dumps(data.record)


def imagenet(root, train=None, val=None):
    write_classes(root / "train", train or {"n01": 10, "n02": 10}, suffix=".JPEG")
    write_classes(root / "val", val or {"n01": 2, "n02": 3}, suffix=".JPEG", seed=50)
    return root


def test_of_imagenet_the_validation_folder_is_tested_on(tmp_path):
    data = load_data("imagenet", root=imagenet(tmp_path), image_size=16, val_fraction=0.2)
    assert data.record["splits"] == {"train": 16, "val": 4, "test": 5}
    assert [label for _, label in data.test] == [0, 0, 1, 1, 1]
    whole = load_data("imagenet", root=tmp_path, image_size=16, val_fraction=0)
    assert whole.record["splits"] == {"train": 20, "val": 0, "test": 5}


def folder_without(root, what):
    if what == "root":
        return root / "none"
    if what == "classes":
        return root
    if what == "images":
        (root / "a").mkdir()
        return root
    if what == "val":
        write_classes(root / "train", {"a": 1})
        return root
    return imagenet(root, {"a": 2, "b": 2, "c": 2}, {"a": 2, "c": 2})


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("imagefolder", "root", r"data.root '.*none' is not a folder"),
        ("cifar10", "root", r"data.root '.*none' is not a folder"),
        ("imagefolder", "classes", r"has no folders of classes; expected root/CLASS/"),
        ("imagefolder", "images", r"there are no images in '.*'"),
        ("imagenet", "val", r"val' has no folders of classes; expected root/train/CLASS/"),
        ("imagenet", "a class", r"'b' is a folder in train/ but not in val/ \(3 and 2 classes\)"),
        ("cifar10", "images", r"data set cifar10 in '.*': Dataset not found.*data.download: true"),
    ],
)
def test_what_is_missing_is_named(tmp_path, name, what, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_data(name, root=folder_without(tmp_path, what))


def test_a_root_that_does_not_fit_the_name_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"data.root is missing: imagenet is read from a folder"):
        load_data("imagenet")
    with pytest.raises(ValueError, match=r"data.root is '.*', but digits is not read from files"):
        load_data("digits", root=tmp_path)
    with pytest.raises(ValueError, match="digits are 8x8 and grey"):
        load_data("digits", image_size=32)
    for statistics in ({"mean": (0.5,)}, {"std": (0.5,)}):
        with pytest.raises(ValueError, match=r"digits have .*: leave data\.mean and data\.std out"):
            load_data("digits", **statistics)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root, monkeypatch, classes):
    """CIFAR's batches, small; torchvision is told their digests, which it goes on checking."""
    kind = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key, names = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    sizes = {"train_list": 2 * classes, "test_list": classes}
    for number, (attribute, count) in enumerate(sizes.items()):
        file = folder / getattr(kind, attribute)[0][0]
        batch = {
            "data": pixels(number, (count, 3072), channels=1),
            key: [at % classes for at in range(count)],
        }
        file.write_bytes(pickle.dumps(batch))
        monkeypatch.setattr(kind, attribute, [[file.name, md5(file)]])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({names: [f"class {at}" for at in range(classes)]}))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    return folder


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_from_its_batches(tmp_path, monkeypatch, classes):
    write_cifar(tmp_path, monkeypatch, classes)
    data = load_data(f"cifar{classes}", root=tmp_path, val_fraction=0.5, augment="none")
    assert data.record["splits"] == dict.fromkeys(("train", "val", "test"), classes)
    assert data.classes[3] == "class 3"
    stored = torch.from_numpy(pixels(1, (classes, 3072), channels=1)).view(-1, 3, 32, 32)
    read, _ = data.test.images.read(2)
    assert torch.equal(read, stored[2])
    image, label = data.test[2]
    assert image.shape == (3, 32, 32)
    assert label == 2


def test_cifar_that_is_damaged_is_an_error(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path, monkeypatch, 10)
    cut_short(folder / "data_batch_1")
    with pytest.raises(FileNotFoundError, match=r"data set cifar10 in '.*': .*corrupted"):
        load_data("cifar10", root=tmp_path)


def test_cifar_training_images_are_moved_and_mirrored(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, 10)
    data = load_data("torchvision/CIFAR10", root=tmp_path)
    torch.manual_seed(0)
    draws = torch.stack([data.train[0][0] for _ in range(20)])
    assert draws.shape == (20, 3, 32, 32)
    assert len(torch.unique(draws, dim=0)) > 10


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.tobytes())


def test_mnist_is_grey_unless_three_channels_are_wanted(tmp_path):
    for part, count in (("train", 40), ("t10k", 10)):
        raw = tmp_path / "MNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels(0, (count, 28, 28), channels=1))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    data = load_data("mnist", root=tmp_path)
    assert data.image_shape == (1, 28, 28)
    assert data.record["splits"] == {"train": 30, "val": 10, "test": 10}
    colour = load_data("mnist", root=tmp_path, channels=3, image_size=32)
    image, _ = colour.test[0]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image[0], image[2])


def test_broken_files_of_a_torchvision_set_are_found_too(tmp_path):
    write_classes(tmp_path / "eurosat" / "2750", COUNTS, suffix=".jpg")
    data = load_data("eurosat", root=tmp_path, image_size=8)
    assert data.record["images_per_class"]["test"] == [2, 2, 4]
    (tmp_path / "eurosat" / "2750" / "eel" / "4.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 40 images cannot be read, .*eel/4\.jpg"):
        load_data("eurosat", root=tmp_path)
    data = load_data("eurosat", root=tmp_path, on_corrupt="skip")
    assert list(data.record["skipped"]) == ["eurosat/2750/eel/4.jpg"]


def test_food101_is_read_by_its_lists(tmp_path):
    base = tmp_path / "food-101"
    lists = {}
    for split, names in (("train", range(10)), ("test", range(10, 14))):
        lists[split] = {food: [f"{food}/{n}" for n in names] for food in ("pie", "soup")}
    for food in ("pie", "soup"):
        write_images(base / "images" / food, 14, suffix=".jpg")
    (base / "meta").mkdir()
    for split, content in lists.items():
        (base / "meta" / f"{split}.json").write_text(json.dumps(content))
    data = load_data("food101", root=tmp_path, image_size=8)
    assert data.record["splits"] == {"train": 18, "val": 2, "test": 8}
    assert data.classes == ("pie", "soup")


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_torchvision_set_is_called_as_it_can_be(name):
    entry = TORCHVISION[name]
    constructor = getattr(torchvision.datasets, entry.constructor)
    assert entry.constructor.lower() == name
    for arguments in (entry.train, entry.val, entry.test):
        if arguments is not None:
            inspect.signature(constructor).bind("root", **arguments, download=False)
    assert len(entry.kind.statistics[0]) == entry.kind.channels


def test_names_are_found_with_or_without_where_they_are_from():
    assert canonical_name("torchvision/CIFAR10") == canonical_name("cifar10") == "cifar10"
    assert all(canonical_name(name) == name for name in DATA_SETS)
    for name in ("torchvision/glyphs", "timm/cifar10", "", "cifar"):
        with pytest.raises(ValueError, match=f"unknown data set '{name}'"):
            canonical_name(name)
