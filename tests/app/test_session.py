"""A recipe with its device, its data and its network."""

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

from limpq_ext.app.recipe import make_recipe
from limpq_ext.app.session import Session, choose_device


def test_a_network_starts_from_the_seed_of_its_recipe_whatever_was_drawn_before():
    starts = []
    for seed in (3, 3, 4):
        torch.rand(seed)
        session = Session(make_recipe({"seed": seed}))
        starts.append(session.create_model().state_dict()["conv1.weight"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_device_that_is_not_there_is_named():
    assert choose_device("cpu") == torch.device("cpu")
    for name, message in (("gpu", "unknown device 'gpu'"), ("meta", "'meta' is not supported")):
        with pytest.raises(ValueError, match=message):
            choose_device(name)


def test_an_entry_of_an_enumeration_is_no_file():
    model = {"name": "resnet18", "weights": "ResNet18_Weights.V9"}
    session = Session(make_recipe({"model": model}))
    with pytest.raises(ValueError, match=r"'resnet18' has no weights 'ResNet18_Weights.V9'"):
        session.given_float()
