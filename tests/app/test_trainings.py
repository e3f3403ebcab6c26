"""The joint stage of a recipe in every way that it can be executed."""

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

from limpq_ext.app import trainings
from limpq_ext.app.recipe import make_recipe
from limpq_ext.app.session import Session
from limpq_ext.training.calibration import calibrate


def indicators(**options):
    torch.manual_seed(0)
    joint = {"epochs": 1, "lr": 0.01, "batch_size": 512, **options}
    # Eight channels: in channels_last with four, torch's own gradient of a strided 1x1 convolution
    # writes past its memory on processors without AVX-512.
    model = {"name": "cifar_resnet", "options": {"width": 8}}
    session = Session(make_recipe({"bits": [2, 4], "model": model, "joint": joint}))
    return trainings.train_indicators(session, session.create_model())[0]


@pytest.mark.parametrize(
    "options",
    [
        {"autocast": "bfloat16"},
        {"autocast": "float16"},
        {"channels_last": True},
        {"distill": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_recipes_way_of_execution_gives_nearly_the_same_indicators(options):
    for ours, plain in zip(indicators(**options).layers, indicators().layers, strict=True):
        for kind in ("weight", "activation"):
            for bits, value in getattr(plain, kind).items():
                assert getattr(ours, kind)[bits] == pytest.approx(value, rel=0.1), ours.name


def test_a_recipe_may_take_the_sensitivities_of_the_same_training():
    found, learned = indicators(indicators="sensitivities"), indicators()
    assert found.meta["score"] == "loss_aware"
    assert found.meta["measured_steps"] == learned.meta["steps"] - 1  # the first one starts scales
    for ours, theirs in zip(found.layers, learned.layers, strict=True):
        assert ours.name == theirs.name
        for kind in ("weight", "activation"):
            assert getattr(ours, kind)[2] > getattr(ours, kind)[4] > 0


@pytest.mark.parametrize("key", ["weight_bank", "share_stem", "drop_relu"])
def test_what_branches_share_can_be_switched_off_in_a_recipe(key, monkeypatch):
    trainers = []
    original = trainings.JointTrainer

    def remember(*arguments, **options):
        trainers.append(original(*arguments, **options))
        return trainers[-1]

    monkeypatch.setattr(trainings, "JointTrainer", remember)
    shared = []
    for options in ({}, {key: False}):
        indicators(**options)
        shared.append(trainers[-1].shared)
    name = {"share_stem": "stem", "drop_relu": "dropped_relus"}.get(key, key)
    assert shared[0][name]
    assert not shared[1][name]


def test_a_cuda_graph_on_the_cpu_is_an_error():
    with pytest.raises(ValueError, match="cuda_graph needs a model on a CUDA device"):
        indicators(cuda_graph=True)


def test_what_the_branches_share_can_be_switched_off_in_a_recipe(monkeypatch):
    made = []

    class Noted(trainings.JointTrainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(trainings, "JointTrainer", Noted)
    indicators()
    indicators(weight_bank=False, share_stem=False, drop_relu=False)
    shared, plain = (trainer.shared for trainer in made)
    assert shared["weight_bank"]
    assert shared["stem"]
    assert shared["dropped_relus"] > 0
    assert plain == {"weight_bank": False, "stem": False, "dropped_relus": 0}


def tuning_session(**finetune):
    model = {"name": "cifar_resnet", "options": {"blocks": 1, "width": 4}}
    section = {"epochs": 1, "lr": 0.01, "batch_size": 64, **finetune}
    session = Session(make_recipe({"model": model, "device": "cpu", "finetune": section}))
    return session, session.uniform_policy(session.profile())


def tensors_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("way", [None, "correct", "reestimate", "off"])
def test_a_policy_is_calibrated_as_the_recipe_says_before_it_is_tuned(way, monkeypatch):
    session, policy = tuning_session(calibrate=way, calibration_batches=2)
    begun = []
    monkeypatch.setattr(
        trainings, "finetune", lambda model, *others, **options: begun.append(tensors_of(model))
    )
    trainings.finetune_policy(session, session.create_model(), policy)
    model = session.create_model()
    expected = session.quantize(model, policy)
    loader = trainings.train_loader(session, session.recipe.finetune)
    batches = [batch for batch, _ in zip(loader, range(2), strict=False)]
    if way != "off":
        calibrate(expected, batches, reference=None if way == "reestimate" else model)
    for name, value in expected.state_dict().items():
        assert value.equal(begun[0][name]), name


def test_a_network_that_is_calibrated_for_a_first_look_is_corrected(tmp_path):
    session, policy = tuning_session()
    weights = tmp_path / "float.safetensors"
    session.save(session.create_model(), weights)
    looked_at = trainings.calibrated_network(session, weights, policy, 2)
    model = session.float_model(weights)
    expected = session.quantize(model, policy)
    loader = trainings.train_loader(session, session.recipe.joint)
    batches = [batch for batch, _ in zip(loader, range(2), strict=False)]
    calibrate(expected, batches, reference=model)
    for name, value in expected.state_dict().items():
        assert value.equal(looked_at.state_dict()[name]), name
