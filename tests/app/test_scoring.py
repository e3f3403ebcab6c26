"""What is measured of networks that are not trained, and on which images."""

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

from limpq_ext import scores
from limpq_ext.app import scoring
from limpq_ext.app.recipe import make_recipe
from limpq_ext.app.session import Session
from limpq_ext.app.trainings import first_batches
from limpq_ext.data.loading import ImageSet


def session(**content):
    model = {"name": "cifar_resnet", "options": {"blocks": 1, "width": 4}}
    part = {"batches": 2, "batch_size": 32, "method": "fisher"}
    return Session(
        make_recipe({"model": model, "bits": [2, 4], "device": "cpu", **content, "scores": part})
    )


def test_scores_are_those_of_the_recipes_network_on_its_first_images():
    own = session(quantization={"per_channel_weights": True, "scale_start": "max"})
    model = own.create_model()
    found = scoring.measure_scores(own, model, print, own.profile())
    expected = scores.fisher(
        model, first_batches(own, 32, 2), (2, 4), per_channel_weights=True, scale_start="max"
    )
    assert found == expected


def test_where_step_sizes_begin_as_lsqs_do_what_is_not_trained_begins_at_the_least_error():
    own = session(quantization={"scale_start": "lsq"})
    assert scoring.measuring(own)["scale_start"] == "mse"
    model = own.create_model()
    found = scoring.measure_scores(own, model, print, own.profile())
    assert found == scores.fisher(model, first_batches(own, 32, 2), (2, 4))


def images_of(batches):
    return {tuple(image.flatten().tolist()) for x, _ in batches for image in x}


def test_policies_are_checked_on_validation_images():
    own = session(check={"batches": 3})
    others = scoring.other_batches(own)
    assert [len(target) for _, target in others] == [32, 32, 32]
    validation = [(own.data.val[index][0][None], None) for index in range(len(own.data.val))]
    assert images_of(others) <= images_of(validation)
    assert not images_of(others) & images_of(first_batches(own, 32, 2))


def test_without_validation_images_policies_are_checked_after_the_batches_of_the_scores():
    own = session(check={"batches": 3}, data={"val_fraction": 0})
    ours, others = first_batches(own, 32, 2), scoring.other_batches(own)
    assert [len(target) for _, target in ours] == [32, 32]
    assert [len(target) for _, target in others] == [32, 32, 32]
    assert len(images_of([*ours, *others])) == 5 * 32


def test_policies_are_refined_on_validation_images_that_are_left():
    own = session(check={"batches": 2})
    refining, others = scoring.refining_batches(own), scoring.other_batches(own)
    assert [len(target) for _, target in refining] == [32, 32]
    assert len(images_of([*refining, *others])) == 4 * 32
    few = session(check={"batches": 4})  # that is all of them
    assert images_of(scoring.refining_batches(few)) == images_of(first_batches(few, 32, 2))


def test_policies_are_checked_under_the_calibration_of_the_scores():
    own = session()
    found, ours = scoring.checking(own), first_batches(own, 32, 2)
    assert images_of(found["calibration"]) == images_of(ours)
    assert {**found, "calibration": None} == {**scoring.measuring(own), "calibration": None}


def test_scores_are_measured_on_images_that_are_not_augmented(monkeypatch):
    monkeypatch.setattr(ImageSet, "unaugmented", lambda images: images.part(0.5, 0))
    own = session()
    half = own.data.train.unaugmented()
    samples = sum(len(target) for _, target in first_batches(own, 32, 1000))
    assert samples == 2 * (len(half) // 32) * 32


def test_a_check_that_cannot_be_made_says_why():
    own = session(search={"bitops": "w2a2"})
    model, costs = own.create_model(), own.profile()
    found = scoring.measure_scores(own, model, print, costs)
    reason = scoring.check_policy(own, model, found, costs, lambda done, total: None)
    assert isinstance(reason, str)
    assert reason.startswith("random policies cannot spread under bitops")
