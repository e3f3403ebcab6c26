"""The table of a run's results."""

import pytest

pytest.importorskip("pydantic")

from limpq_ext.app.results import Result, result_of
from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.policy import Policy


def test_a_result_counts_a_network_in_float_and_at_the_bits_of_a_policy():
    layer, fixed = LayerCost("a", "linear", 10, 6, 7), LayerCost("b", "linear", 5, 2, 7)
    costs = Costs((layer,), (fixed,), float_parameters=3)
    assert result_of("float", 0.5, costs, None) == Result(
        "float", 0.5, bitops=10 * 32 * 32, size_bytes=4 * 8, compression=1.0, total_bytes=4 * 11
    )
    size = (6 * 2 + 2 * 8) / 8  # the fixed layer at 8 bits
    assert result_of("policy", 0.25, costs, Policy.uniform(costs, 2, 4)) == Result(
        "policy", 0.25, bitops=10 * 2 * 4, size_bytes=size, compression=32 / size,
        total_bytes=size + 4 * 3,
    )  # fmt: skip
