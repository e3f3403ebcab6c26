"""Which bit-widths there are."""

import numpy as np
import pytest

from limpq_ext.values.bits import check_bits


@pytest.mark.parametrize("bits", [2, 16, np.int64(4)])
def test_a_bit_width_comes_back_as_a_plain_integer(bits):
    width = check_bits("layer 'a'", bits)
    assert type(width) is int
    assert width == bits


@pytest.mark.parametrize("bits", [1, 17, -4, 10**30])
def test_a_bit_width_outside_2_to_16_is_named(bits):
    with pytest.raises(ValueError, match=rf"^layer 'a': {bits} bits is outside 2 to 16$"):
        check_bits("layer 'a'", bits)


@pytest.mark.parametrize("bits", [True, 4.0, "4", None])
def test_what_is_no_integer_is_no_bit_width(bits):
    with pytest.raises(TypeError, match=rf"^layer 'a': bits must be an integer, got {bits!r}$"):
        check_bits("layer 'a'", bits)
