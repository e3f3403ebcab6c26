import pytest

pytest.importorskip("pydantic")

from limpq_ext.recipe import Recipe, dump_recipe, load_recipe, make_recipe


def test_a_recipe_survives_being_written(tmp_path):
    recipe = make_recipe(
        {"bits": [2, 4], "search": {"bitops": 1e9, "size": {"weight_bits": 4}}, "seed": 3}
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_an_empty_file_is_the_default_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    assert load_recipe(tmp_path / "recipe.yaml") == Recipe()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epochs": 3}, "recipe: epochs: unknown key"),
        ({"joint": {"epoch": 3}}, "recipe: joint"),
        ({"finetune": {"epochs": 1, "lr": 0.1, "rate": 1}}, "recipe: finetune.rate: unknown key"),
        (
            {"finetune": {"epochs": 0, "lr": 0.1}},
            "recipe: finetune.epochs: .*greater than or equal",
        ),
        ({"finetune": {"epochs": 1, "lr": -1}}, "recipe: finetune.lr: .*greater than 0"),
        ({"bits": [1, 4]}, "recipe: bits: .*1 bits is outside 2 to 16"),
        ({"bits": []}, "recipe: bits: .*bits is empty"),
        ({"bits": "all"}, "recipe: bits: "),
        ({"search": {"non_monotone": "ignore"}}, "recipe: search.non_monotone: .*forbid"),
        ({"baseline": {"weight_bits": 32}}, "recipe: baseline.weight_bits: "),
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
