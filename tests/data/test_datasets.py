"""Data sets by name: split, normalised, and without what is broken."""

import numpy as np
import pytest
import torch
from pictures import cut_short, write_classes

pytest.importorskip("torchvision")

from limpq_ext.data.datasets import load_data

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
