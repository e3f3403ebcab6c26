import pytest

from limpq_ext.values.names import check_patterns, listed, matches


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("layer1.0.conv1", True),
        ("layer1", True),  # a module around it
        ("layer1.*", True),
        ("*.conv1", True),
        ("layer", False),
        ("conv1", False),
        ("layer1.0.conv1.weight", False),
    ],
)
def test_a_pattern_fits_a_layer_or_a_module_around_it(pattern, fits):
    assert matches("layer1.0.conv1", [pattern]) == fits
    assert matches("layer1.0.conv1", ["head", pattern]) == fits


def test_a_pattern_that_fits_nothing_is_named():
    check_patterns(["a", "b.*"], ["a", "b.c"], "fixed")
    with pytest.raises(ValueError, match=r"exclude: the model has no module 'c\.\*'"):
        check_patterns(["a", "c.*"], ["a", "b.c"], "exclude")


def test_names_in_a_sentence_are_five_at_most():
    assert listed(["a"]) == "'a'"
    assert listed([*"abcde"]) == "'a', 'b', 'c', 'd', 'e'"
    assert listed([*"abcdefg"]) == "'a', 'b', 'c', 'd', 'e' and 2 more"
