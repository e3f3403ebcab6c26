"""What makes two networks the same, and what does not."""

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limpq_ext.graph.fingerprint import graph_digest, source_digest, structure_digest
from limpq_ext.nn.named import CifarResNet

X = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self, *, stride=1, slope=0.1, drop=0.1, change=None):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, stride=stride, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(drop)
        self.slope = slope
        self.change = change

    def forward(self, x):
        y = F.leaky_relu(self.norm(self.one(x)), self.slope)
        z = self.two(y)
        if self.change == "swapped":
            return self.drop(z - y).mean((2, 3))
        if self.change == "rewritten":
            return torch.mean(self.drop(y.sub(z)), dim=(2, 3)).view(-1, 4)
        return self.drop(y - z).mean((2, 3))


def test_the_same_network_has_the_same_digests():
    for digest in (lambda m: graph_digest(m, X), structure_digest, source_digest):
        assert digest(Net()) == digest(Net())


@pytest.mark.parametrize(
    "change", [{"stride": 2}, {"slope": 0.2}, {"change": "swapped"}], ids=lambda c: str(c)
)
def test_another_forward_is_another_graph(change):
    assert graph_digest(Net(**change), X) != graph_digest(Net(), X)


def test_another_way_to_write_the_same_forward_is_the_same_graph():
    assert graph_digest(Net(change="rewritten"), X) == graph_digest(Net(), X)


def test_a_batch_of_another_size_is_the_same_graph_and_the_model_keeps_its_mode():
    model = Net().train()
    assert graph_digest(model, X) == graph_digest(model, X[:1])
    assert model.training
    assert model.norm.num_batches_tracked == 0


def test_what_evaluation_does_not_show_is_in_the_structure():
    assert graph_digest(Net(drop=0.5), X) == graph_digest(Net(), X)
    assert structure_digest(Net(drop=0.5)) != structure_digest(Net())


def test_a_forward_that_cannot_be_followed_is_named():
    with pytest.raises(ValueError, match=r"cannot follow Net\.forward: "):
        graph_digest(Net(), torch.zeros(1, 5, 8, 8))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module of Python and imports it anew."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(tmp_path / f"{name}.py"):
            del sys.modules[name]


BLOCKS = "from torch import nn\n\nclass Block(nn.Linear):\n    pass\n"
FACTORY = "from written_blocks import Block\n\ndef build():\n    return Block(2, 3)\n"


def test_source_counts_with_what_it_imports_but_not_comments(written):
    written("written_blocks", BLOCKS)
    first = source_digest(written("written_net", FACTORY).build(), "written_net")
    again = source_digest(written("written_net", "# new\n" + FACTORY).build(), "written_net")
    assert again == first
    changed = FACTORY.replace("(2, 3)", "(2, 3, bias=True)")
    assert source_digest(written("written_net", changed).build(), "written_net") != first
    written("written_blocks", BLOCKS + "    scale = 2\n")
    assert source_digest(written("written_net", FACTORY).build(), "written_net") != first


def test_source_of_installed_packages_does_not_count():
    empty = source_digest(nn.Linear(2, 3))
    assert source_digest(CifarResNet()) == empty
    assert source_digest(Net()) != empty
