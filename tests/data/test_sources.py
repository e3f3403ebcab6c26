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
from limpq_ext.data.images import UnreadableImageError
from limpq_ext.data.sources import DATA_SETS, TORCHVISION, canonical_name

COUNTS = {"cat": 10, "dog": 10, "eel": 20}


def test_one_folder_of_classes_is_split_in_three(tmp_path):
    data = load_data("imagefolder", root=write_classes(tmp_path, COUNTS), image_size=8)
    assert data.classes == ("cat", "dog", "eel")
    assert data.record["images_per_class"] == {
        "train": [7, 7, 15], "val": [1, 1, 1], "test": [2, 2, 4]
    }  # fmt: skip
    assert data.record["carved_from_train"] == {"val": 0.1, "test": 0.2}
    files = [set(split.indices.tolist()) for split in (data.train, data.val, data.test)]
    assert len(set.union(*files)) == sum(map(len, files)) == 40
    image, label = data.train[0]
    assert image.shape == data.image_shape == (3, 8, 8)
    assert image.dtype == torch.float32
    assert label == 0


def test_without_augmentation_training_images_are_what_evaluation_would_see(tmp_path):
    for split in ("train", "test"):
        write_classes(tmp_path / split, COUNTS)
    data = load_data("imagefolder", root=tmp_path, image_size=8, augment="none", val_fraction=0)
    for at in range(len(data.train)):
        assert torch.equal(data.train[at][0], data.test[at][0])


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


def test_the_split_depends_on_its_seed_alone(tmp_path):
    write_classes(tmp_path, COUNTS)
    first, again, other = (load_data("imagefolder", root=tmp_path, seed=seed) for seed in (0, 0, 1))
    assert first.record == again.record
    assert not np.array_equal(first.test.indices, other.test.indices)
    assert first.record["fingerprint"] != other.record["fingerprint"]


def test_the_fingerprint_tells_of_another_file(tmp_path):
    write_classes(tmp_path, COUNTS)
    before = load_data("imagefolder", root=tmp_path).record["fingerprint"]
    (tmp_path / "cat" / "0.png").unlink()
    assert load_data("imagefolder", root=tmp_path).record["fingerprint"] != before


def test_training_images_are_augmented_and_others_are_not(tmp_path):
    data = load_data("imagefolder", root=write_classes(tmp_path, COUNTS), image_size=8)
    torch.manual_seed(0)
    assert not torch.equal(data.train[0][0], data.train[0][0])
    assert torch.equal(data.test[0][0], data.test[0][0])
    plain = load_data("imagefolder", root=tmp_path, image_size=8, augment="none")
    assert torch.equal(plain.train[0][0], plain.train[0][0])


def test_grey_images_are_normalised_as_they_say(tmp_path):
    write_classes(tmp_path, COUNTS)
    options = {"root": tmp_path, "image_size": 8, "channels": 1}
    data = load_data("imagefolder", **options, mean=[0.5], std=[0.25])
    assert data.image_shape == (1, 8, 8)
    assert data.test[0][0].min() >= -2
    assert data.test[0][0].max() <= 2
    with pytest.raises(ValueError, match=r"data\.mean has 3 numbers, but the images 1 channels"):
        load_data("imagefolder", **options, mean=[0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"data\.std is \[0\.0\], expected numbers above 0"):
        load_data("imagefolder", **options, std=[0.0])


def test_an_empty_class_is_an_error_or_is_kept_and_counted(tmp_path):
    write_classes(tmp_path, {**COUNTS, "fox": 0})
    with pytest.raises(ValueError, match=r"class 'fox' has no train images; data.on_corrupt: skip"):
        load_data("imagefolder", root=tmp_path)
    data = load_data("imagefolder", root=tmp_path, on_corrupt="skip")
    assert data.num_classes == 4
    assert data.record["empty_classes"] == ["fox"]


def broken_folder(root):
    write_classes(root, COUNTS)
    cut_short(root / "dog" / "3.png")
    (root / "eel" / "0.png").write_bytes(b"")
    return root


def test_broken_files_are_an_error_that_names_the_first(tmp_path):
    message = r"2 of 40 images cannot be read, the first: .*dog/3\.png: .*; data.on_corrupt: skip"
    with pytest.raises(ValueError, match=message) as error:
        load_data("imagefolder", root=broken_folder(tmp_path))
    assert "\n" not in str(error.value)


def test_broken_files_are_skipped_and_counted(tmp_path):
    data = load_data("imagefolder", root=broken_folder(tmp_path), on_corrupt="skip")
    assert sorted(data.record["skipped"]) == ["dog/3.png", "eel/0.png"]
    assert sum(data.record["splits"].values()) == 38
    assert len([image for image, _ in (*data.train, *data.val, *data.test)]) == 38
    assert data.broken() == []


def test_where_all_files_are_broken_nothing_is_left_to_train_on(tmp_path):
    for path in write_classes(tmp_path, {"a": 2}).rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="data set imagefolder: there are no images to train on"):
        load_data("imagefolder", root=tmp_path, on_corrupt="skip")


def test_a_file_that_breaks_later_is_replaced_by_the_next_of_its_split(tmp_path):
    data = load_data(
        "imagefolder", root=write_classes(tmp_path, COUNTS), on_corrupt="skip", augment="none"
    )
    path = data.train.images.path(int(data.train.indices[2]))
    path.unlink()
    assert torch.equal(data.train[2][0], data.train[3][0])
    assert data.broken() == [str(path.relative_to(tmp_path))]
    last = len(data.train) - 1
    data.train.images.path(int(data.train.indices[last])).write_bytes(b"")
    assert torch.equal(data.train[last][0], data.train[0][0])


def test_a_file_that_breaks_later_is_an_error_that_names_it(tmp_path):
    data = load_data("imagefolder", root=write_classes(tmp_path, COUNTS))
    path = data.train.images.path(int(data.train.indices[2]))
    cut_short(path)
    with pytest.raises(UnreadableImageError, match=str(path)):
        data.train[2]


def test_a_disk_that_is_gone_is_an_error_also_where_files_are_skipped(tmp_path):
    data = load_data("imagefolder", root=write_classes(tmp_path, COUNTS), on_corrupt="skip")
    tmp_path.rename(tmp_path.with_name("gone"))
    with pytest.raises(UnreadableImageError, match=r"29 images in a row cannot be read, last .*"):
        data.train[0]


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
