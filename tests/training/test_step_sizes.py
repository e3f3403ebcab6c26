import pytest
import torch
from networks import Depthwise
from torch.nn import functional as F

from limpq_ext import FileFormatError, Indicators, JointTrainer, prepare
from limpq_ext.training.checkpoint import Checkpoint

BITS = (2, 4)


def test_indicators_come_out_of_any_checkpoint_of_a_joint_training(tmp_path):
    model = prepare(Depthwise(), BITS, example_input=torch.zeros(2, 3, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = JointTrainer(model, optimizer, F.cross_entropy)
    trainer.step(torch.randn(4, 3, 8, 8), torch.arange(4))
    expected = trainer.indicators()
    Checkpoint(tmp_path / "joint.checkpoint").save({"parts": {"trainer": trainer.state_dict()}})
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    for name in ("joint.checkpoint", "state.pt"):
        found = Indicators.from_checkpoint(tmp_path / name)
        assert (found.bits, found.layers) == (expected.bits, expected.layers)


def test_a_checkpoint_without_a_joint_training_has_no_indicators(tmp_path):
    path = tmp_path / "x.checkpoint"
    torch.save({"format": "limpq-checkpoint", "model": {}}, path)
    with pytest.raises(FileFormatError, match=r"x\.checkpoint: holds no state of a joint training"):
        Indicators.from_checkpoint(path)
    path.write_bytes(b"PK")
    with pytest.raises(FileFormatError, match=r"x\.checkpoint: not a readable checkpoint"):
        Indicators.from_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="cannot read the checkpoint file"):
        Indicators.from_checkpoint(tmp_path / "none.checkpoint")
