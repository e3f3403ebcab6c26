"""The operators against the plain PyTorch chain, for any shape and order of the axes."""

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import DTYPES, check, compute_dtype


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    per_channel=st.booleans(),
    axis=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_and_order_of_axes_equals_the_chain(shape, per_channel, axis, order, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    axes = list(range(len(shape)))
    order.shuffle(axes)
    x = x.permute(axes)
    if per_channel:
        axis = axis % x.dim()
        scale = torch.rand(x.shape[axis], dtype=compute_dtype(dtype)) + 0.01
        check(x, scale, -8, 7, axis)
    else:
        check(x, torch.tensor(0.2, dtype=compute_dtype(dtype)), -8, 7)
