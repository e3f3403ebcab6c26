import dataclasses
import datetime
import inspect
import re
from fractions import Fraction

import pytest

pytest.importorskip("pydantic")

from limpq_ext.allocation.budgets import BUDGETS, of_8bit, uniform
from limpq_ext.allocation.problem import Question
from limpq_ext.allocation.search import search
from limpq_ext.app.recipe import (
    DataSection,
    FinetuneSection,
    Recipe,
    SearchSection,
    TrainingSection,
    dump_recipe,
    load_recipe,
    load_restrictions,
    make_recipe,
    override,
    parse_assignment,
    shipped_recipes,
)
from limpq_ext.data.datasets import DataOptions
from limpq_ext.training.finetune import FinetuneOptions, TrainingOptions
from limpq_ext.values.interactions import Interactions
from limpq_ext.values.latency import LatencyEntry, LatencyTable


def test_a_recipe_survives_being_written(tmp_path):
    recipe = make_recipe(
        {"bits": [2, 4], "search": {"bitops": 1e9, "size": {"weight_bits": 4}}, "seed": 3}
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def everything():
    return {
        "bitops": "w3a4",
        "size": "50%",
        "compression": {"weight_bits": 4},
        "mean_weight_bits": 4.5,
        "bits_per_weight": "5",
        "activation_memory": 1e6,
        "latency": "1.5e-3",
        "latency_table": "latency.csv",
        "pairs": {"*": [[4, 8], "w8a8"]},
        "fixed": {"conv*": "w8a8"},
        "tied": ["block1", ["a", "b"]],
        "tie_shared_inputs": True,
        "min_bits": {"a": 4, "b": [4, 8], "c": "w4a8"},
        "activation_bits": 8,
        "normalise": True,
        "interactions": "interactions.json",
        "smoothness": 0.01,
        "time_limit": 60,
        "gap": 1e-4,
    }


def test_a_recipe_can_ask_for_every_budget_and_restriction(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latency.csv").write_text(
        "layer,weight_bits,activation_bits,seconds\na,4,8,0.001\n"
    )
    interactions = Interactions.from_table({(("a", "weight"), ("b", "weight")): {(4, 4): 0.5}})
    interactions.save(tmp_path / "interactions.json")
    recipe = make_recipe({"search": everything()})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    question = recipe.search.question()
    assert set(question) == Question.__annotations__.keys()
    assert question["interactions"] == interactions
    assert question["latency_table"] == LatencyTable((LatencyEntry("a", 4, 8, 0.001),),
                                                     {"source": "latency.csv"})  # fmt: skip
    expected = {
        "bitops": uniform(3, 4),
        "size": of_8bit(Fraction(1, 2)),
        "compression": uniform(4, 3),
        "bits_per_weight": 5,
        "latency": 1.5e-3,
        "mean_activation_bits": None,
        "pairs": {"*": ((4, 8), (8, 8))},
        "fixed": {"conv*": (8, 8)},
        "tied": ("block1", ("a", "b")),
        "min_bits": {"a": 4, "b": (4, 8), "c": (4, 8)},
    }
    assert {name: question[name] for name in expected} == expected


BUDGET_VALUES = {"size": "w4a8", "compression": 8.0, "mean_weight_bits": 3.5}


@pytest.mark.parametrize("name", BUDGET_VALUES)
def test_a_given_budget_takes_the_place_of_the_default_one(name):
    value = BUDGET_VALUES[name]
    for recipe in (
        make_recipe({"search": {name: value}}),
        override(Recipe(), {f"search.{name}": value}),
        override(Recipe(), {"search": {name: value}}),
        override(override(Recipe(), {"seed": 3}), {f"search.{name}": value}),
    ):
        assert getattr(recipe.search, name) == value
        assert recipe.search.bitops is None


def test_where_no_budget_is_given_the_bitops_of_three_bits_are_the_limit():
    for recipe in (
        Recipe(),
        make_recipe({"search": {"alpha": 2.0}}),
        make_recipe({"search": {"size": None}}),
        override(Recipe(), {"search.alpha": 2.0}),
    ):
        assert recipe.search.question()["bitops"] == uniform(3, 3)
    assert make_recipe({"search": {"bitops": None}}).search.bitops is None
    assert override(Recipe(), {"search.bitops": None}).search.bitops is None


def test_a_budget_that_a_recipe_names_stays_beside_a_new_one():
    recipe = make_recipe({"search": {"bitops": "w4a4"}})
    both = override(recipe, {"search.size": "w4a8"}).search
    assert (both.bitops, both.size) == ("w4a4", "w4a8")
    level = override(Recipe(), {"search.bitops.weight_bits": 4}).search.question()["bitops"]
    assert level == uniform(4, 3)


def test_search_and_its_question_take_the_same():
    options = inspect.signature(search).parameters
    assert set(options) - {"indicators", "costs"} == Question.__annotations__.keys()


def test_a_budget_of_the_table_is_taken_and_described_everywhere():
    options = inspect.signature(search).parameters.values()
    taken = [own.name for own in options if own.annotation == "Asked | None"]
    asked = [name for name, kind in Question.__annotations__.items() if "Asked" in str(kind)]
    fields = [name for name in SearchSection.model_fields if name in BUDGETS]
    arguments = inspect.getdoc(search).partition("\nArgs:\n")[2].partition("\nReturns:\n")[0]
    described = re.findall(r"^    (\w+): ", arguments, re.MULTILINE)
    assert described == list(inspect.signature(search).parameters)
    assert taken == asked == fields == list(BUDGETS)


def test_restrictions_can_be_a_file_of_their_own(tmp_path):
    path = tmp_path / "restrictions.yaml"
    path.write_text("pairs: {'layer1.*': [[4, 8]]}\ntied: [layer2]\n")
    found = load_restrictions(path)
    assert found["pairs"] == {"layer1.*": ((4, 8),)}
    assert found["tied"] == ("layer2",)
    assert found["weight_bits"] is None
    path.write_text("bitops: 3\n")
    with pytest.raises(ValueError, match=r"restrictions\.yaml: bitops: unknown key"):
        load_restrictions(path)
    with pytest.raises(FileNotFoundError, match=r"restrictions file .* does not exist"):
        load_restrictions(tmp_path / "none.yaml")


def test_an_empty_file_is_the_default_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    assert load_recipe(tmp_path / "recipe.yaml") == Recipe()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epochs": 3}, "recipe: epochs: unknown key"),
        ({"joint": {"epoch": 3}}, r"recipe: joint\.epochs: is missing \(and 2 more\)"),
        ({"finetune": {"epochs": 1, "lr": 0.1, "rate": 1}}, "recipe: finetune.rate: unknown key"),
        (
            {"finetune": {"epochs": 0, "lr": 0.1}},
            "recipe: finetune.epochs: .*greater than or equal",
        ),
        ({"finetune": {"epochs": 1, "lr": -1}}, "recipe: finetune.lr: .*greater than 0, got -1$"),
        (
            {"finetune": {"epochs": 1, "lr": 1, "init": "joint"}, "bits": [2]},
            "^recipe: finetune.init is joint",
        ),
        (
            {
                "finetune": {"epochs": 1, "lr": 1, "init": "joint", "calibrate": "correct"},
                "scores": {"method": "learned"},
            },
            "^recipe: finetune.calibrate is correct, but with finetune.init joint there is nothing",
        ),
        (
            {"finetune": {"epochs": 1, "lr": 1, "init": "joint"}, "scores": {"method": "fisher"}},
            "^recipe: finetune.init is joint, but with scores.method fisher there is no joint",
        ),
        ({"scores": {"method": "magic"}}, "recipe: scores.method: .*there is no score 'magic'"),
        ({"scores": {"candidates": ["auto"]}}, "recipe: scores.candidates: .*no score 'auto'"),
        ({"scores": {"candidates": []}}, "recipe: scores.candidates: .*nothing to choose from"),
        ({"check": {"random": 2}}, "recipe: check.random: .*expected 0, or 3 or more"),
        ({"refine": {"seconds": 0}}, "recipe: refine.seconds: .*greater than 0"),
        (
            {"finetune": {"epochs": 1, "lr": 1, "calibrate": "always"}},
            "recipe: finetune.calibrate: .*'correct', 'reestimate' or 'off'",
        ),
        ({"bits": [1, 4]}, "recipe: bits: .*1 bits is outside 2 to 16$"),
        ({"bits": []}, "recipe: bits: .*bits is empty"),
        ({"bits": "all"}, "recipe: bits: "),
        ({"search": {"non_monotone": "ignore"}}, "recipe: search.non_monotone: .*forbid"),
        ({"search": {"size": "big"}}, "recipe: search.size: .*'big' is not a number, a level"),
        ({"search": {"bitops": [1]}}, "recipe: search.bitops: .*valid number, got "),
        ({"seed": datetime.date(2020, 1, 1)}, "recipe: seed: .*integer, got datetime.date"),
        ({"search": {"size": "w1a4"}}, "recipe: search.size: .*outside 2 to 16"),
        ({"search": {"fixed": {"a": "8"}}}, "recipe: search.fixed.a: .*no pair of bits"),
        ({"search": {"pairs": {"a": [[4]]}}}, r"recipe: search\.pairs\.a\[0\]\[1\]: is missing"),
        ({"search": {"min_bits": {"a": 1}}}, "recipe: search.min_bits.a"),
        ({"search": {"weight_bits": 17}}, "recipe: search.weight_bits: .*less than or equal"),
        ({"baseline": {"weight_bits": 32}}, "recipe: baseline.weight_bits: "),
        ({"data": {"name": "imagenet22k"}}, "recipe: data.name: .*unknown data set 'imagenet22k'"),
        ({"data": {"fraction": 0}}, "recipe: data.fraction: .*greater than 0"),
        ({"data": {"fraction": 1.5}}, "recipe: data.fraction: .*less than or equal to 1"),
        ({"data": {"val_fraction": 1}}, "recipe: data.val_fraction: .*less than 1"),
        ({"data": {"on_corrupt": "ignore"}}, "recipe: data.on_corrupt: .*'error' or 'skip'"),
        ({"data": {"augment": "mixup"}}, "recipe: data.augment"),
        ({"data": {"channels": 4}}, "recipe: data.channels: .*1 or 3"),
        ({"data": {"glyphs": {"train_images": 10}}}, "recipe: data.glyphs.train_images: .*34"),
        ({"data": {"glyphs": {"font": []}}}, "recipe: data.glyphs.font: unknown key"),
    ],
)
def test_wrong_keys_and_values_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(content)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe '.*none\.yaml' does not exist"):
        load_recipe(tmp_path / "none.yaml")
    path = tmp_path / "broken.yaml"
    path.write_text("seed: [1")
    with pytest.raises(ValueError, match=r"broken\.yaml: not a YAML file"):
        load_recipe(path)
    path.write_text("- seed")
    with pytest.raises(ValueError, match=r"broken\.yaml: expected keys and values, not list"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"broken\.yaml: not a YAML file"):
        load_recipe(path)


LIMPQ = {
    "resnet18-imagenet": ("resnet18", 256, 5),
    "resnet50-imagenet": ("resnet50", 64, 3),
    "mobilenetv1-imagenet-w4a4": ("timm/mobilenetv1_100", 256, 5),
    "mobilenetv1-imagenet-w4": ("timm/mobilenetv1_100", 256, 5),
}


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_valid_and_says_what_it_does(name, tmp_path):
    assert len(shipped_recipes()[name]) > 20
    recipe = load_recipe(name)
    assert recipe.bits == (2, 3, 4, 5, 6)
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "dumped.yaml") == recipe


def test_the_shipped_recipes_are_these():
    assert {"cifar10", "digits", "glyphs", *LIMPQ} == set(shipped_recipes())
    assert load_recipe("digits") == Recipe()


@pytest.mark.parametrize("name", LIMPQ)
def test_the_numbers_of_limpq_are_its_published_ones(name):
    recipe = load_recipe(name)
    joint, tuned = recipe.joint, recipe.finetune
    assert (recipe.model.name, joint.batch_size, joint.epochs) == LIMPQ[name]
    assert (joint.optimizer, joint.lr, joint.momentum, joint.weight_decay) == (
        "sgd", 0.01, 0.9, 2.5e-5
    )  # fmt: skip
    assert joint.label_smoothing == tuned.label_smoothing == 0.1
    assert recipe.scores.method == "learned"
    assert (tuned.epochs, tuned.lr, tuned.warmup_epochs) == (90, 0.04, 5)
    assert (recipe.data.name, recipe.data.image_size) == ("imagenet", 224)
    assert (recipe.quantization.scale_start, recipe.calibration) == ("lsq", "off")


LEARNED = {"scores": {"method": "learned"}}


@pytest.mark.parametrize(
    ("content", "calibration"),
    [
        ({}, "correct"),
        ({"quantization": {"scale_start": "max"}}, "correct"),
        ({"quantization": {"scale_start": "lsq"}}, "off"),
        ({"quantization": {"scale_start": "lsq"}, "finetune": {"calibrate": "correct"}}, "correct"),
        ({"finetune": {"init": "joint"}, **LEARNED}, "off"),
        ({"finetune": {"init": "joint", "calibrate": "reestimate"}, **LEARNED}, "reestimate"),
        ({"finetune": {"calibrate": "off"}}, "off"),
    ],
)
def test_a_policy_is_calibrated_before_it_is_tuned_unless_it_begins_elsewhere(content, calibration):
    if "finetune" in content:
        content = {**content, "finetune": {"epochs": 1, "lr": 0.01, **content["finetune"]}}
    assert make_recipe(content).calibration == calibration


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("finetune.epochs=3", "finetune.epochs", 3),
        ("bits=[2, 4]", "bits", (2, 4)),
        ("search.bitops=1e9", "search.bitops", 1e9),
        ("search.bitops=null", "search.bitops", None),
        ("search.size.weight_bits=4", "search.size.weight_bits", 4),
        ("data.root=/some = folder", "data.root", "/some = folder"),
        ("model.options={width: 4}", "model.options", {"width": 4}),
        ("model.options.width=8", "model.options.width", 8),
        ("joint.distill=true", "joint.distill", True),
        ("joint.autocast=off", "joint.autocast", "off"),
        ("data.scan=off", "data.scan", "off"),
    ],
)
def test_any_value_can_be_set_by_its_key(text, key, value):
    changed = override(Recipe(), dict([parse_assignment(text)]))
    inner = changed
    for part in key.split("."):
        inner = inner[part] if isinstance(inner, dict) else getattr(inner, part)
    assert inner == value
    assert override(changed, {key: value}) == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("finetune.epoch=3", "recipe: finetune.epoch: unknown key"),
        ("finetuning.epochs=3", "recipe: finetuning: unknown key"),
        ("seed.value=3", "recipe: seed.value: 'seed' is 0 and has no keys"),
        ("finetune.epochs=many", "recipe: finetune.epochs: "),
        ("finetune.epochs", "'finetune.epochs': expected KEY=VALUE"),
        ("=3", "'=3': expected KEY=VALUE"),
        ("bits=[2", "'bits=.2': the value is not YAML"),
    ],
)
def test_what_cannot_be_set_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        override(Recipe(), dict([parse_assignment(text)]))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[" * 10_000, "nested more than 64 deep"),
        ("!!bool x", "not of the type that its tag says"),
        ("!!timestamp x", "not of the type that its tag says"),
        ("2001-99-99", "month must be in 1..12"),
        ("&a [*a]", "a value that holds itself"),
        ("{a: 1, a: 2}", "key 'a' stands twice"),
        ("1" * 10_001, "more than 10000 characters"),
        (
            "[&a0 x, " + ", ".join(f"&a{i + 1} [*a{i}, *a{i}]" for i in range(20)) + "]",
            "more than 100000 values",
        ),
    ],
)
def test_a_value_that_is_no_plain_yaml_is_one_sentence(value, reason):
    with pytest.raises(ValueError, match=f"the value is not YAML: .*{reason}") as caught:
        parse_assignment(f"seed={value}")
    assert len(str(caught.value).splitlines()) == 1


def test_merged_keys_of_yaml_may_be_overridden(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("joint: &a {epochs: 3, lr: 0.5}\nfinetune: {<<: *a, epochs: 4}\n")
    recipe = load_recipe(path)
    assert (recipe.finetune.epochs, recipe.finetune.lr) == (4, 0.5)


def test_a_name_that_is_no_recipe_is_told_which_are():
    with pytest.raises(FileNotFoundError, match=r"'resnet34' does not exist: .*resnet18-imagenet"):
        load_recipe("resnet34")


@pytest.mark.parametrize(
    ("section", "options", "own"),
    [
        (DataSection, DataOptions, {"fraction", "workers"}),
        (TrainingSection, TrainingOptions, {"batch_size", "autocast"}),
        (
            FinetuneSection,
            FinetuneOptions,
            {"batch_size", "autocast", "init", "calibrate", "calibration_batches"},
        ),
    ],
)
def test_sections_are_made_of_the_options_of_what_they_are_for(section, options, own):
    names = {field.name for field in dataclasses.fields(options)}
    assert set(section.model_fields) == names | own
    for field in dataclasses.fields(options):
        for kind, bound in field.metadata["bounds"].items():
            bounds = section.model_fields[field.name].metadata
            assert any(getattr(found, kind, None) == bound for found in bounds)
