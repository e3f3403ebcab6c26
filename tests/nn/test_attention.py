"""Attention through its projections' layers computes what it computed before."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limpq_ext import (
    JointTrainer,
    Policy,
    apply_policy,
    prepare,
    profile,
    quantized_layers,
    select_bits,
)
from limpq_ext.nn.attention import ProjectedAttention, with_layers
from limpq_ext.values.policy import LayerBits

OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "bias": False, "batch_first": True},
]


def attention(**options):
    """An attention with random weights, biases too, and the same through layers."""
    torch.manual_seed(0)
    float_one = nn.Sequential(nn.MultiheadAttention(8, 2, **options))
    for parameter in float_one.parameters():
        nn.init.normal_(parameter)
    return float_one[0], with_layers(float_one, lambda name: True)[0]


def inputs_of(module, batch=3, length=5, source=7):
    if module._qkv_same_embed_dim:
        x = torch.randn(length, batch, 8)
        tensors = [x, x, x]
    else:
        shapes = [(length, 8), (source, module.kdim), (source, module.vdim)]
        tensors = [torch.randn(steps, batch, width) for steps, width in shapes]
    if module.batch_first:
        x = tensors[0].transpose(0, 1)
        tensors = [x if tensor is tensors[0] else tensor.transpose(0, 1) for tensor in tensors]
    return tensors


def masks(batch, length, source):
    padded = torch.zeros(batch, source, dtype=torch.bool)
    padded[1, -2:] = True
    causal = torch.ones(length, source).triu(1).bool()
    added = torch.randn(length, source)
    return [
        {},
        {"attn_mask": causal},
        {"attn_mask": added},
        {"attn_mask": torch.randn(2 * batch, length, source)},
        {"key_padding_mask": padded},
        {"attn_mask": causal, "key_padding_mask": padded},
        {"attn_mask": added, "key_padding_mask": padded.float() * -9},
        {"attn_mask": causal, "is_causal": True},
    ]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_weights_and_gradients_are_those_of_torch(options, need_weights, training):
    theirs, ours = (module.train(training) for module in attention(**options))
    tensors = inputs_of(theirs)
    for mask in masks(3, 5, 5 if theirs._qkv_same_embed_dim else 7):
        if "is_causal" in mask and (theirs.bias_k is not None or theirs.add_zero_attn):
            continue  # torch then masks the keys that it appended, or not, by need_weights
        expected = theirs(*tensors, need_weights=need_weights, **mask)
        result = ours(*tensors, need_weights=need_weights, **mask)
        torch.testing.assert_close(result, expected)
        expected[0].square().sum().backward()
        result[0].square().sum().backward()
        torch.testing.assert_close(ours.out_proj.weight.grad, theirs.out_proj.weight.grad)
        if theirs._qkv_same_embed_dim:  # one parameter, which both added to
            assert ours.in_proj.weight is theirs.in_proj_weight
        else:
            torch.testing.assert_close(ours.k_proj.weight.grad, theirs.k_proj_weight.grad)


def test_unbatched_inputs_and_weights_of_each_head():
    theirs, ours = attention()
    x = torch.randn(5, 8)
    padded = torch.tensor([False, False, False, True, True])
    for options in ({}, {"average_attn_weights": False}, {"key_padding_mask": padded}):
        torch.testing.assert_close(ours(x, x, x, **options), theirs(x, x, x, **options))


def test_dropout_is_active_in_training_only():
    float_one = nn.Sequential(nn.MultiheadAttention(8, 2, dropout=0.5))
    ours = with_layers(float_one, lambda name: True)[0]
    x = torch.randn(5, 3, 8)
    for need_weights in (False, True):
        ours.train()
        first, second = (ours(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(first, second)
        ours.eval()
        first, second = (ours(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("options", OPTIONS)
def test_states_of_both_forms_load(options):
    theirs, _ = attention(**options)
    for state in (theirs.state_dict(), attention(**options)[1].state_dict()):
        fresh = with_layers(nn.Sequential(nn.MultiheadAttention(8, 2, **options)), lambda _: True)
        keys = set(state)
        fresh[0].load_state_dict(state)
        assert set(state) == keys
        tensors = inputs_of(theirs)
        torch.testing.assert_close(fresh[0](*tensors), theirs(*tensors))


def test_the_float_module_stays_as_it_is_and_parameters_are_shared():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    state = copy.deepcopy(model.state_dict())
    twin = with_layers(model, lambda name: True)
    assert type(model[0]) is nn.MultiheadAttention
    assert isinstance(twin[0], nn.MultiheadAttention)
    assert list(model.state_dict()) == list(state)
    assert twin[0].in_proj.weight is model[0].in_proj_weight


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_kept(training):
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)).train(training)
    twin = with_layers(model, lambda name: True)
    assert {module.training for module in twin.modules()} == {training}


def test_what_is_left_out_keeps_its_class():
    twin = with_layers(nn.ModuleList([nn.MultiheadAttention(8, 2) for _ in range(2)]), "1".__eq__)
    assert [type(module) for module in twin] == [nn.MultiheadAttention, ProjectedAttention]


def test_a_module_that_stands_twice_stays_one():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2)] * 2)
    twin = with_layers(model, lambda name: True)
    assert twin[0] is twin[1]


def test_a_hint_without_its_mask_is_an_error():
    _, ours = attention()
    x = torch.randn(5, 3, 8)
    with pytest.raises(ValueError, match="is_causal is a hint about attn_mask, which is None"):
        ours(x, x, x, is_causal=True)


class Crossing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.attention(x, x.flip(1), x)[0])


def test_cross_attention_with_one_projection_is_refused_in_words():
    with pytest.raises(ValueError, match="its key or value is another tensor than its query"):
        profile(Crossing(), torch.zeros(2, 5, 8))
    left_in_float = profile(Crossing(), torch.zeros(2, 5, 8), fixed=["last"], exclude=["attention"])
    assert [layer.name for layer in left_in_float.layers] == ["first"]


ENCODER = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.encoder = nn.TransformerEncoder(copy.deepcopy(ENCODER), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


INNER = [
    f"encoder.layers.{i}.{name}"
    for i in range(2)
    for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
]


def test_encoders_give_the_same_and_never_use_their_fused_kernel():
    torch.manual_seed(0)
    model = Encoder().eval()
    twin = with_layers(model, lambda name: True).eval()
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x))
        padded = torch.zeros(2, 5, dtype=torch.bool)
        padded[0, 3:] = True
        results = [
            m.encoder(m.embed(x), src_key_padding_mask=padded)[~padded] for m in (twin, model)
        ]
    torch.testing.assert_close(*results)
    quantized = prepare(model, (2, 4), example_input=x)
    quantized.train()(x)
    with torch.no_grad():
        at_four = quantized.eval()(x)
        for layer in quantized_layers(quantized).values():
            layer.weight.mul_(0)  # the kernel of the float encoder would be given these
            layer.ready_weight = layer.weight_quantizer(torch.randn_like(layer.weight))
        assert not torch.equal(quantized(x), at_four)


def test_transformers_with_decoders_have_three_projections_across():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Transformer(8, 2, 1, 1, 16, batch_first=True)).eval()
    twin = with_layers(model, lambda name: True).eval()
    source, target = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(twin[0](source, target), model[0](source, target))
    names = dict(twin.named_modules())
    assert {f"0.decoder.layers.0.multihead_attn.{x}_proj" for x in "qkv"} < set(names)
    assert "0.decoder.layers.0.self_attn.in_proj" in names


def test_prepare_profile_and_policy_agree_on_names():
    model, x = Encoder(), torch.zeros(2, 5, 6)
    costs = profile(model, x)
    assert [layer.name for layer in costs.layers] == INNER
    assert [layer.macs for layer in costs.layers[:4]] == [5 * 8 * 24, 5 * 64, 5 * 128, 5 * 128]
    assert set(quantized_layers(prepare(model, (2, 4), example_input=x))) == set(INNER)
    policy = Policy(tuple(LayerBits(name, 3, 5) for name in INNER))
    with pytest.warns(UserWarning, match="no bits for them: 'embed', 'head'"):
        quantized = apply_policy(model, policy)
    assert set(quantized_layers(quantized)) == set(INNER)


def test_every_projection_is_quantized_in_every_branch():
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(4, 5, 6)
    prepared = prepare(model, (2, 4), example_input=x)
    trainer = JointTrainer(prepared, torch.optim.SGD(prepared.parameters(), 0.01), F.cross_entropy)
    trainer.step(x, torch.tensor([0, 1, 2, 0]))
    assert trainer.shared["weight_bank"]
    for name, layer in quantized_layers(prepared).items():
        assert layer.weight_quantizer.scale.grad.count_nonzero() == 2, name
        assert layer.input_quantizer.scale.grad.count_nonzero() == 2, name
    outputs = []
    for bits in (2, 4):
        select_bits(prepared, bits)
        outputs.append(prepared.eval()(x))
    assert not torch.equal(*outputs)


def test_what_the_branches_share_of_an_encoder_does_not_change_its_gradients():
    torch.manual_seed(0)
    model, x, target = Encoder().double(), torch.randn(4, 5, 6).double(), torch.tensor([0, 1, 2, 0])
    gradients = []
    for shared in (True, False):
        prepared = prepare(model, (2, 4), example_input=x).double()
        trainer = JointTrainer(
            prepared,
            torch.optim.SGD(prepared.parameters(), 0.0),
            F.cross_entropy,
            weight_bank=shared,
            share_stem=shared,
            drop_relu=shared,
            clip_value=1e9,
        )
        trainer.step(x, target)
        trainer.step(x, target)
        assert trainer.shared["stem"] == shared
        gradients.append({name: p.grad.clone() for name, p in prepared.named_parameters()})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], msg=name)


def test_excluded_attention_stays_float():
    model = Encoder()
    names = quantized_layers(
        prepare(model, (4,), example_input=torch.zeros(1, 5, 6), exclude=["*.self_attn"])
    )
    assert set(names) == {name for name in INNER if "linear" in name}


@pytest.mark.parametrize("version", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
@pytest.mark.parametrize("shift", [[0, 0], [3, 2], [0, 2]])
@pytest.mark.parametrize("bias", [True, False])
def test_shifted_windows_give_the_same(version, shift, bias):
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    torch.manual_seed(0)
    model = nn.Sequential(getattr(swin, version)(8, [7, 5], shift, 2, qkv_bias=bias))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    twin = with_layers(model, lambda name: True)
    assert type(twin[0]) is not type(model[0])
    assert isinstance(twin[0], getattr(swin, version))
    assert list(twin.state_dict()) == list(model.state_dict())
    for height, width in ((9, 12), (5, 4), (14, 10)):
        x = torch.randn(2, height, width, 8)
        torch.testing.assert_close(twin(x), model(x), atol=2e-5, rtol=1e-5)
    results = []
    for network in (model, twin):
        network.zero_grad()
        network(x).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beit_base_patch16_224", {"img_size": 32, "depth": 1}),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1}),
        ("swinv2_tiny_window8_256", {"img_size": 64, "depths": (1, 1, 1, 1)}),
    ],
)
def test_attention_of_timm_with_biases_of_its_own_gives_the_same(name, options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **options).eval()
    twin = with_layers(model, lambda name: True).eval()
    changed = [m for m in twin.modules() if getattr(m, "qkv_bias_separate", False)]
    assert changed
    x = torch.randn(1, 3, options["img_size"], options["img_size"])
    torch.testing.assert_close(twin(x), model(x), atol=1e-5, rtol=1e-4)
