import copy

import pytest
import torch
from torch import nn

from limpq_ext.nn.batch_norm import SwitchableBatchNorm

NORMS = [
    (lambda: nn.BatchNorm1d(4), (8, 4)),
    (lambda: nn.BatchNorm2d(4), (8, 4, 3, 3)),
    (lambda: nn.BatchNorm2d(4, momentum=None), (8, 4, 3, 3)),
    (lambda: nn.BatchNorm2d(4, affine=False), (8, 4, 3, 3)),
    (lambda: nn.BatchNorm2d(4, track_running_stats=False), (8, 4, 3, 3)),
    (lambda: nn.BatchNorm3d(4), (8, 4, 3, 3, 2)),
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("make_module", "shape"), NORMS)
def test_each_bit_width_has_a_batch_norm_of_its_own(make_module, shape):
    module = make_module()
    switchable = SwitchableBatchNorm.from_float(copy.deepcopy(module), (2, 4, 8), "conv")
    separate = {bits: copy.deepcopy(module) for bits in (2, 4, 8)}
    assert isinstance(switchable, type(module))
    for step, bits in enumerate((4, 2, 4, 8, 4)):
        x = torch.randn(shape) + step
        switchable.select(bits)
        assert torch.equal(switchable(x), separate[bits](x))
    switchable.eval()
    for row, bits in enumerate((2, 4, 8)):
        switchable.select(bits)
        x = torch.randn(shape)
        assert torch.equal(switchable(x), separate[bits].eval()(x))
        for name, value in separate[bits].state_dict().items():
            assert torch.equal(switchable.state_dict()[name][row], value)


@pytest.mark.usefixtures("device")
def test_a_float_batch_norm_loads_into_every_row():
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.weight.data.normal_()
    switchable = SwitchableBatchNorm.from_float(nn.BatchNorm2d(4), (2, 4), "conv")
    state = norm.state_dict()
    switchable.load_state_dict(state)
    assert state["weight"].shape == (4,)
    for row in range(2):
        assert torch.equal(switchable.weight[row], norm.weight)
        assert torch.equal(switchable.running_mean[row], norm.running_mean)


def test_a_row_that_does_not_exist_cannot_be_selected():
    switchable = SwitchableBatchNorm.from_float(nn.BatchNorm2d(4), (2, 4), "layer1.conv")
    with pytest.raises(ValueError, match=r"fed by 'layer1\.conv' has no row for 3 bits"):
        switchable.select(3)


@pytest.mark.usefixtures("device")
def test_a_switchable_batch_norm_compiles_without_a_graph_break():
    norm = SwitchableBatchNorm.from_float(nn.BatchNorm2d(4), (2, 4), "conv")
    norm.select(4)
    twin, x = copy.deepcopy(norm), torch.randn(8, 4, 3, 3)
    assert torch.equal(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), norm(x))
    for name, value in norm.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value)
