"""Batches of several inputs, by position and by keyword, through everything that takes batches."""

import collections

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limpq_ext import (
    JointTrainer,
    Policy,
    apply_policy,
    calibrate,
    confuse,
    evaluate,
    finetune,
    prepare,
    profile,
    quantized_layers,
    reestimate_batch_norm,
)
from limpq_ext.nn.inputs import call, moved, samples_in

BITS = (2, 4)


class Pictures(nn.Module):
    """Pictures with numbers beside them; both have a part of their own before a common one."""

    def __init__(self):
        super().__init__()
        self.pictures = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.conv = nn.Conv2d(6, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.numbers = nn.Linear(4, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input, numbers):
        x = F.relu(self.norm(self.conv(self.pictures(input)))).mean((2, 3))
        return self.head(F.relu(self.hidden(x + self.numbers(numbers))))


class Stacked(Pictures):
    """The same with one input that holds both."""

    def forward(self, both):
        picture, numbers = both.split([3 * 8 * 8, 4], dim=1)
        return super().forward(picture.unflatten(1, (3, 8, 8)), numbers)


def as_tuple(input, numbers):
    return input, numbers


def as_list(input, numbers):
    return [input, numbers]


def as_keywords(input, numbers):
    return {"numbers": numbers, "input": input}


def as_mapping(input, numbers):
    return collections.UserDict(numbers=numbers, input=input)


def stacked(input, numbers):
    return torch.cat([input.flatten(1), numbers], 1)


FORMS = [as_tuple, as_list, as_keywords, as_mapping]


def batches(form, count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            form(
                torch.randn(6, 3, 8, 8, generator=generator), torch.randn(6, 4, generator=generator)
            ),
            torch.arange(6) % 3,
        )
        for _ in range(count)
    ]


def network(form):
    torch.manual_seed(0)
    return Stacked() if form is stacked else Pictures()


def prepared_network(form):
    example = batches(form)[0][0]
    return prepare(network(form), BITS, example_input=example, fixed=["pictures.0", "head"])


def assert_same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [{}, {"share_stem": False, "drop_relu": False}, {"weight_bank": False}, {"distill": True}],
)
def test_a_joint_training_of_several_inputs_is_that_of_one_input_that_holds_them(form, options):
    ours, reference = (
        JointTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, **options)
        for model in map(prepared_network, (form, stacked))
    )
    for _ in range(2):
        for one, other in zip(batches(form), batches(stacked), strict=True):
            ours.step(*one)
            reference.step(*other)
    for name, value in reference.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, msg=name)
    shared = options.get("share_stem", True)
    assert ours.shared["stem"] == shared


@pytest.mark.parametrize("form", [as_tuple, as_keywords])
def test_a_compiled_joint_step_takes_several_inputs(form):
    def trainer(**options):
        model = prepared_network(form)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return JointTrainer(model, optimizer, F.cross_entropy, **options)

    ours = trainer(compile_forward=lambda rest: torch.compile(rest, backend="aot_eager"))
    reference = trainer()
    for batch in batches(form, 3):
        ours.step(*batch)
        reference.step(*batch)
    for name, value in reference.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_a_bad_value_in_one_of_several_inputs_is_named(form):
    model = prepared_network(form)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = JointTrainer(model, optimizer, F.cross_entropy)
    good, bad = batches(form)
    trainer.step(*good)
    (bad[0]["numbers"] if form in (as_keywords, as_mapping) else bad[0][1]).fill_(torch.nan)
    with pytest.raises(ValueError, match="the batch itself"):
        trainer.step(*bad)


@pytest.mark.parametrize("form", FORMS)
def test_fine_tuning_of_several_inputs_is_that_of_one_input_that_holds_them(form):
    models, records = [], []
    for own in (form, stacked):
        model = network(own)
        options = {"teacher": network(own), "reestimate_batches": 2, "ema_decay": 0.5}
        records.append(finetune(model, batches(own), epochs=2, lr=0.1, **options))
        models.append(model)
    assert_same_state(*models)
    assert [record["accuracy"] for record in records[0]] == [r["accuracy"] for r in records[1]]


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_of_several_inputs_is_that_of_one_input_that_holds_them(form):
    ours, other = network(form), network(form)
    nn.init.normal_(other.head.weight, generator=torch.Generator().manual_seed(3))
    twin, twin_of_other = network(stacked), network(stacked)
    twin_of_other.load_state_dict(other.state_dict())
    assert evaluate(ours, batches(form)) == evaluate(twin, batches(stacked))
    found = confuse(ours, other, batches(form))
    assert found == confuse(twin, twin_of_other, batches(stacked))


@pytest.mark.parametrize("form", FORMS)
def test_calibration_of_several_inputs_is_that_of_one_input_that_holds_them(form):
    models = []
    for own in (form, stacked):
        model = prepared_network(own)
        calibrate(model, batches(own))
        fixed = ["pictures.0", "head"]
        policy = Policy.uniform(list(quantized_layers(model)), 4, 4, fixed=fixed)
        policy = apply_policy(network(own), policy)
        calibrate(policy, batches(own))
        reestimate_batch_norm(policy, batches(own, 1))
        models.append((model, policy))
    for first, second in zip(*models, strict=True):
        assert_same_state(first, second)


def test_cuda_graphs_refuse_several_inputs_and_say_so():
    model = prepared_network(as_keywords)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = JointTrainer(model, optimizer, F.cross_entropy)
    trainer.cuda_graph = True  # which the constructor grants on a GPU alone
    message = (
        "cuda_graph needs batches of one input tensor and one target tensor, this one has dict"
    )
    with pytest.raises(ValueError, match=message):
        trainer.step(*batches(as_keywords)[0])


class Named(nn.Module):
    """Takes all its inputs by keyword alone."""

    def __init__(self):
        super().__init__()
        self.network = Pictures()

    def forward(self, *, input, numbers, scaled=None):
        return self.network(input, numbers if scaled is None else scaled)


@pytest.mark.parametrize("form", [as_keywords, as_mapping])
def test_a_forward_of_keywords_is_prepared_profiled_and_quantized(form):
    given = batches(form)[0][0]
    torch.manual_seed(0)
    model = Named()
    fixed = ["network.pictures.0", "network.head"]
    costs = profile(model, given, fixed=fixed)
    by_position = profile(Pictures(), batches(as_tuple)[0][0], fixed=["pictures.0", "head"])
    assert [layer.name for layer in costs.layers] == [
        f"network.{layer.name}" for layer in by_position.layers
    ]
    assert [layer.macs for layer in costs.layers] == [layer.macs for layer in by_position.layers]
    assert {tuple(shape) for shape in costs.meta["input_shapes"]} == {(3, 8, 8), (4,)}
    prepared = prepare(model, BITS, example_input=given, fixed=fixed)
    prepared(**given)
    policy = Policy.uniform(costs, 4, 4)
    quantized = apply_policy(model, policy, example_input=given)
    assert call(quantized, given).shape == (6, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "example_input is a dict that holds no tensor"),
        ((), "example_input is a tuple that holds no tensor"),
        (None, "example_input is a NoneType that holds no tensor"),
        ({"input": torch.ones(())}, r"example_input has shape \(\), expected a batch"),
    ],
)
def test_an_example_without_a_batch_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        prepare(Named(), BITS, example_input=given)
    with pytest.raises(ValueError, match=message):
        profile(Named(), given)


def test_only_a_batch_itself_and_its_mappings_are_unpacked():
    def says(*args, **kwargs):
        return args, kwargs

    assert call(says, 3) == ((3,), {})
    assert call(says, (3, [4])) == ((3, [4]), {})
    assert call(says, {"a": (3,)}) == ((), {"a": (3,)})


def test_tensors_are_moved_wherever_they_stand_and_samples_counted():
    inputs = {"picture": torch.zeros(3, 2), "more": [torch.zeros(3), "text", None]}
    there = moved((inputs, torch.zeros(3)), torch.device("meta"))
    assert there[0]["picture"].is_meta
    assert there[0]["more"][0].is_meta
    assert there[0]["more"][1:] == ["text", None]
    assert there[1].is_meta
    assert samples_in(inputs) == samples_in(collections.UserDict(inputs)) == 3
    assert samples_in((torch.tensor(1.0), torch.zeros(5, 2))) == 5
    with pytest.raises(ValueError, match="a batch of dict holds no tensor"):
        samples_in({"a": 3})
