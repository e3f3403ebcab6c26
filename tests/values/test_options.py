"""Options of a function: their bounds, and how they are given."""

import dataclasses

import pytest

from limpq_ext.values.options import Options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baking(Options):
    minutes: int = option(ge=1)
    heat: float = option(180.0, gt=0, lt=300, help="degrees")
    steam: float | None = option(None, ge=0, le=1)


def test_options_come_as_one_or_by_keyword_or_both():
    assert Baking.chosen(None, {"minutes": 5}) == Baking(minutes=5, heat=180.0)
    given = Baking(minutes=5, steam=1)
    assert Baking.chosen(given, {}) == given
    assert Baking.chosen(given, {"heat": 200}) == Baking(minutes=5, heat=200, steam=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0}, "minutes is 0, expected at least 1"),
        ({"heat": 0}, "heat is 0, expected more than 0"),
        ({"heat": float("nan")}, "heat is nan, expected more than 0"),
        ({"heat": 300}, "heat is 300, expected less than 300"),
        ({"steam": 1.5}, "steam is 1.5, expected at most 1"),
    ],
)
def test_a_number_out_of_bounds_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Baking.chosen(Baking(minutes=5), changes)


@pytest.mark.parametrize("options", [None, Baking(minutes=5)])
def test_what_is_no_option_is_named(options):
    with pytest.raises(TypeError, match="there is no option 'salt': it is one of minutes, heat, s"):
        Baking.chosen(options, {"minutes": 5, "salt": 1})


def test_what_has_no_default_has_to_be_given():
    with pytest.raises(TypeError, match="the option 'minutes' is missing"):
        Baking.chosen(None, {"heat": 200})
