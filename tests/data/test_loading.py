"""Batches of image files: the same for any number of processes, and after a resume."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from pictures import cut_short, write_classes

pytest.importorskip("torchvision")

from limpq_ext.data.datasets import load_data
from limpq_ext.data.images import UnreadableImageError
from limpq_ext.data.loading import make_loader

SOURCE = {"a": 12, "b": 12, "c": 12}


@pytest.fixture
def folder(tmp_path):
    return write_classes(tmp_path / "images", SOURCE, suffix=".jpg")


def load(folder, **options):
    return load_data("imagefolder", root=folder, image_size=8, val_fraction=0, **options)


def batches(data, *, workers=0, epoch=0, first=0, train=True):
    loader = make_loader(data, batch_size=4, train=train, seed=3, workers=workers)
    if train:
        loader.batch_sampler.set_position(epoch, first)
    return list(loader)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])


def test_loading_processes_change_no_bit(folder):
    data = load(folder)
    for train, split in ((True, data.train), (False, data.test)):
        assert_same(batches(split, workers=2, train=train), batches(split, train=train))


def test_a_resume_within_an_epoch_gives_what_was_left(folder):
    data = load(folder)
    whole = batches(data.train, epoch=1)
    assert_same(batches(data.train, epoch=1, first=3, workers=2), whole[3:])


def test_every_epoch_is_augmented_anew(folder):
    data = load(folder)
    seeded = make_loader(data.train, batch_size=4, train=True, seed=3).dataset
    assert torch.equal(seeded[0, 5][0], seeded[0, 5][0])
    assert not torch.equal(seeded[0, 5][0], seeded[1, 5][0])


def test_loading_draws_nothing_from_the_global_generators(folder):
    data = load(folder)
    before = torch.get_rng_state()
    batches(data.train)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_in_a_loading_process_names_the_file(folder):
    data = load(folder)
    path = data.train.images.path(int(data.train.indices[5]))
    cut_short(path)
    with pytest.raises(UnreadableImageError, match=f"^{path}: ") as error:
        batches(data.train, workers=2)
    assert "\n" not in str(error.value)


def test_files_that_break_later_are_replaced_alike_and_counted_everywhere(folder):
    data = load(folder, on_corrupt="skip")
    path = data.train.images.path(int(data.train.indices[5]))
    cut_short(path)
    assert_same(batches(data.train, workers=2), batches(data.train))
    assert data.broken() == [str(path.relative_to(folder))]
    fresh = load(folder, on_corrupt="skip", scan="off")
    batches(fresh.train, workers=2)
    assert fresh.broken() == data.broken()


def test_a_part_is_stratified_and_augmented_alike(folder):
    data = load(folder)
    part = data.train.part(0.5, 0)
    assert np.bincount(part.labels).tolist() == [5, 5, 5]
    assert set(part.indices) <= set(data.train.indices)
    assert part.random
    assert np.array_equal(part.indices, data.train.part(0.5, 0).indices)


def test_training_images_can_be_read_as_evaluation_reads_them(folder):
    data = load(folder)
    for images in (data.train.unaugmented(), data.train.part(0.5, 0).unaugmented()):
        assert not images.random
        assert images.unaugmented() is images
        for index in (0, 4):
            image, label = images[index]
            place = int(images.indices[index])
            pixels, own = images.images.read(place)
            assert label == own
            assert torch.equal(image, data.val._transform(pixels))


def test_a_file_that_breaks_later_is_replaced_by_the_next_of_its_split(tmp_path):
    data = load_data(
        "imagefolder", root=write_classes(tmp_path, SOURCE), on_corrupt="skip", augment="none"
    )
    path = data.train.images.path(int(data.train.indices[2]))
    path.unlink()
    assert torch.equal(data.train[2][0], data.train[3][0])
    assert data.broken() == [str(path.relative_to(tmp_path))]
    last = len(data.train) - 1
    data.train.images.path(int(data.train.indices[last])).write_bytes(b"")
    assert torch.equal(data.train[last][0], data.train[0][0])


def test_a_file_that_breaks_later_is_an_error_that_names_it(tmp_path):
    data = load_data("imagefolder", root=write_classes(tmp_path, SOURCE))
    path = data.train.images.path(int(data.train.indices[2]))
    cut_short(path)
    with pytest.raises(UnreadableImageError, match=str(path)):
        data.train[2]


def test_a_disk_that_is_gone_is_an_error_also_where_files_are_skipped(tmp_path):
    data = load_data("imagefolder", root=write_classes(tmp_path, SOURCE), on_corrupt="skip")
    tmp_path.rename(tmp_path.with_name("gone"))
    with pytest.raises(UnreadableImageError, match=r"26 images in a row cannot be read, last .*"):
        data.train[0]


@pytest.mark.slow
def test_two_processes_scan_once_and_count_what_broke_in_either(tmp_path):
    root, out = tmp_path / "images", tmp_path / "out"
    for part in ("train", "val"):
        write_classes(root / part, {"a": 10, "b": 10}, suffix=".jpg")
    for broken in ("a/0.jpg", "b/7.jpg"):
        (root / "train" / broken).write_bytes(b"")
    settings = ["data.name=imagenet", "data.image_size=16", "data.on_corrupt=skip"]
    settings += ["data.val_fraction=0", "data.workers=1", "bits=[2, 4]", "device=cpu"]
    settings += ["model.options={blocks: 1, width: 4}", "joint.epochs=1", "finetune.epochs=1"]
    settings += [f"{s}.batch_size=4" for s in ("float_training", "joint", "finetune")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "limpq_ext", "run", "--data", root, "--out", out]
    for setting in (*settings, "float_training.epochs=3"):
        command += ["--set", setting]

    def run(*more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *more], check=True, env=environment, capture_output=True)
        return json.loads((out / "data.json").read_text())

    record = run()
    assert sorted(record["skipped"]) == ["train/a/0.jpg", "train/b/7.jpg"]
    assert (out / "scan.json").exists()
    record = run("--set", "data.scan=off", "--fresh")
    assert record["broken_while_loading"] == ["train/a/0.jpg", "train/b/7.jpg"]
