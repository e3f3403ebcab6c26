"""Forwards that begin at a layer against whole ones, in networks that make it hard."""

import pytest
import torch
from one_tensor import Block, Residual, Twice
from torch import nn
from torch.nn import functional as F

from limpq_ext.scores.replay import Replay


class Aliased(nn.Module):
    """What a module returns is what it was given, and is changed in place behind it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.same = nn.Identity()
        self.part = nn.Unflatten(1, (3, 4))
        self.second = nn.Linear(12, 12)
        self.third = nn.Linear(12, 12)

    def forward(self, x):
        x = self.first(x)
        y = self.same(x)
        y += 1
        z = self.part(x)
        z[:, 0] *= 2
        return self.third(self.second(x) + x)


class Noting(nn.Module):
    """Writes into a list that it is given, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x, notes):
        notes.append(self.linear(x))
        return {"sum": notes[-1] + x, "count": len(notes)}


class Noted(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Noting(), Noting()])
        self.head = nn.Linear(24, 12)

    def forward(self, x):
        notes = []
        for block in self.blocks:
            found = block(x, notes)
            x = found["sum"] * found["count"]
        return self.head(torch.cat([x, notes[0]], 1))


class Catching(Aliased):
    """Goes on whatever a module raises."""

    def forward(self, x):
        for layer in (self.first, self.second, self.third):
            try:
                x = layer(x)
            except Exception:
                x = x * 0
        return x


class Blocks(nn.Module):
    """Blocks that begin with a ReLU in place."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(3), nn.Sequential(Block(3), Block(3)))

    def forward(self, x):
        return self.blocks(x.reshape(-1, 3, 2, 2)).flatten(1)


class Shelf:
    """What modules cannot be seen to hold."""

    def __init__(self):
        self.held = []


class Shelving(nn.Module):
    def __init__(self, shelf):
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.shelf = shelf

    def forward(self, x):
        x = self.linear(x)
        self.shelf.held.append(x)
        return x + 1


class Shelved(nn.Module):
    """Modules leave to others what does not pass through the network."""

    def __init__(self):
        super().__init__()
        self.shelf = Shelf()
        self.first, self.second = Shelving(self.shelf), Shelving(self.shelf)
        self.head = nn.Linear(12, 12)

    def forward(self, x):
        self.shelf.held.clear()
        x = self.head(self.second(self.first(x)))
        return x + sum(self.shelf.held)


class Normed(nn.Module):
    """The weight is computed anew in every forward, by a hook that keeps it."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.utils.weight_norm(nn.Linear(12, 12))
        self.second = nn.Linear(12, 12)

    def forward(self, x):
        return self.second(self.first(x))


def inputs_of(network, samples=6):
    torch.manual_seed(1)
    shape = (3, 6, 6) if isinstance(network, Twice | Residual) else (12,)
    return torch.randn(samples, *shape, dtype=torch.float64)


def layers_of(network):
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def doubled(forward, args, kwargs):
    return 2 * forward(*args, **kwargs)


NETWORKS = [Aliased, Noted, Catching, Blocks, Shelved, Normed, Twice, Residual]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("memory", [2**20, 2000, 0])
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_a_forward_from_a_layer_on_is_a_whole_one(kind, memory):
    torch.manual_seed(0)
    network = kind().double().eval()
    x = inputs_of(network)
    replay = Replay(network, memory)
    with replay.opened():
        replay.prove(layers_of(network), x)
        assert torch.equal(replay.first(x.clone()), network(x.clone()))
        for layer in replay.in_order(layers_of(network)):
            replay.treatments = {layer: doubled}
            most = replay.most_copies([layer])
            found = replay.run(layer, min(most, 3))
            replay.treatments = {}
            handle = layer.register_forward_hook(lambda *call: 2 * call[2])
            expected = network(x.clone())
            handle.remove()
            for part in found.chunk(min(most, 3)):
                torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)
            assert replay.held <= memory
    assert not any("forward" in vars(module) for module in network.modules())


def counted(network):
    """How often each layer computes."""
    calls = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def compute(x, module=module, name=name, forward=module.forward):
                calls[name] = calls.get(name, 0) + len(x)
                return forward(x)

            module.forward = compute
    return calls


@torch.no_grad()
def test_what_ran_before_is_computed_once():
    torch.manual_seed(0)
    network = Residual().double().eval()
    calls = counted(network)
    x = inputs_of(network)
    own = {name: module.forward for name, module in network.named_modules() if name in calls}
    replay = Replay(network, 2**20)
    with replay.opened():
        replay.prove(layers_of(network), x)
        calls.clear()
        replay.first(x)
        assert set(calls.values()) == {len(x)}
        layer = network.blocks[1].body[1]
        calls.clear()
        for copies in (1, 4):
            replay.run(layer, copies)
    names = ["blocks.1.body.1", "blocks.1.body.4", "blocks.1.short.0", "head.1"]
    assert calls == dict.fromkeys(names, 5 * len(x))
    for name, forward in own.items():
        assert network.get_submodule(name).forward is forward


@torch.no_grad()
def test_layers_out_of_their_order_run_in_full():
    torch.manual_seed(0)
    network = Residual().double().eval()
    x = inputs_of(network)
    replay = Replay(network, 2**20)
    with replay.opened():
        replay.prove(layers_of(network), x)
        expected = replay.first(x)
        for layer in reversed(layers_of(network)):
            assert torch.equal(replay.run(layer), expected)


class Mixing(nn.Module):
    """Samples see each other, or lie where no forward of several copies can put them."""

    def __init__(self, mix):
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.mix = mix

    def forward(self, x):
        return self.linear(self.mix(x))


@pytest.mark.parametrize(
    ("mix", "copies"),
    [
        (lambda x: x, 64),
        (lambda x: x.reshape(-1, 3, 4).transpose(1, 2).flatten(1), 64),
        (lambda x: x - x.mean(0), 1),
        (lambda x: x.flip(0), 1),
        (lambda x: x.reshape(6, 12), 1),
        (lambda x: x @ x.mT @ x, 1),
        (lambda x: torch.ones(12, dtype=x.dtype), 1),
    ],
)
@torch.no_grad()
def test_several_copies_run_at_once_only_where_samples_do_not_mix(mix, copies):
    network = Mixing(mix).double().eval()
    x = inputs_of(network)
    replay = Replay(network, 4 * 64 * x.numel() * x.element_size())
    with replay.opened():
        replay.prove([network.linear], x)
        replay.first(x)
        assert replay.most_copies([network.linear]) == copies


@torch.no_grad()
def test_a_single_sample_runs_one_copy_at_a_time():
    network = Mixing(F.relu).double().eval()
    replay = Replay(network, 2**20)
    with replay.opened():
        replay.prove([network.linear], inputs_of(network, 1))
        replay.first(inputs_of(network, 1))
        assert replay.most_copies([network.linear]) == 1
