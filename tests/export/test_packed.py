"""A quantized network in one file, and the same network out of it."""

import copy
import io
import json
import math
import resource
import struct
import subprocess
import sys

import pytest
import torch
from networks import Attending, Depthwise, NoNorm, PaddedConv2d, Shared, Upsampling
from torch import nn
from torch.nn import functional as F

import limpq_ext as lq
from limpq_ext.export.codes import layer_codes
from limpq_ext.nn.attention import with_layers
from limpq_ext.nn.layers import quantizable_base
from limpq_ext.nn.named import CifarResNet
from limpq_ext.values.files import open_atomically
from limpq_ext.values.packed_files import KEY, read_header, words_shape
from limpq_ext.values.policy import LayerBits

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


class Lines(nn.Module):
    """Convolutions of one dimension, one of them in groups, and transposed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 8, 3)
        self.grouped = nn.Conv1d(8, 6, 3, groups=2, dilation=2)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.grouped(F.relu(self.first(x.flatten(2))))
        return self.head(F.relu(self.up(F.relu(x))).mean(2))


class Volumes(nn.Module):
    """Convolutions of three dimensions, and transposed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(3, 4, (1, 3, 3))
        self.up = nn.ConvTranspose3d(4, 6, (2, 1, 2))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.first(x.unflatten(2, (2, -1))))
        return self.head(F.relu(self.up(x)).mean((2, 3, 4)))


class OwnForwards(nn.Sequential):
    """A layer with a forward of its own."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), PaddedConv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        self.append(nn.Linear(256, 5))


class Tied(nn.Module):
    """A classifier with the weights of an embedding, which needs them in float."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 6)
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 5)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        return self.head(x + self.tokens.weight[0])


NETWORKS = [Depthwise, NoNorm, Shared, Upsampling, Attending, Lines, Volumes, OwnForwards, Tied]


def image(dtype=torch.float32):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def names_of(model):
    modules = with_layers(model, lambda name: True).named_modules()
    return [name for name, module in modules if quantizable_base(module)]


def policy_of(names, bits=((2, 16), (3, 5), (4, 4), (5, 7), (6, 2), (7, 3))):
    """These bits in turn, but 8 in the first and the last layer."""
    inner = [LayerBits(n, *bits[i % len(bits)]) for i, n in enumerate(names[1:-1])]
    return lq.Policy(tuple(inner), tuple(LayerBits(n, 8, 8) for n in (names[0], names[-1])))


def quantized(make, dtype=torch.float32, policy=None, **options):
    """A network with a policy, whose scales and statistics come from a batch."""
    torch.manual_seed(0)
    model = make()
    policy = policy or policy_of(names_of(model))
    model = lq.apply_policy(model.to(dtype), policy, scale_start="lsq", **options).train()
    model(image(dtype))
    return model.eval()


def saved(folder, model, **options):
    path = folder / "network.safetensors"
    lq.save(model, path, **options)
    return path


@pytest.mark.parametrize(
    ("dtype", "per_channel", "symmetric"),
    [
        (torch.float32, False, False),
        (torch.float32, True, True),
        (torch.float64, True, False),
        (torch.bfloat16, False, True),
        (torch.float16, True, False),
    ],
)
@pytest.mark.parametrize("make", NETWORKS)
def test_a_network_comes_back_bit_for_bit(tmp_path, make, dtype, per_channel, symmetric):
    how = {"per_channel_weights": per_channel, "symmetric_weights": symmetric}
    model = quantized(make, dtype, **how)
    path = saved(tmp_path, model)
    float_model = make()
    before = copy.deepcopy(float_model.state_dict())
    loaded = lq.load(path, float_model).eval()
    x = image(dtype)
    assert torch.equal(loaded(x), model(x))
    assert type(loaded) is make
    assert all(torch.equal(value, before[name]) for name, value in float_model.state_dict().items())
    ours, theirs = layer_codes(loaded), layer_codes(model)
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        assert torch.equal(layer.weights, theirs[name].weights)
        weight = loaded.get_submodule(name).weight
        assert torch.equal(weight, layer.dequantized().to(dtype))
    state = model.state_dict()
    for name, value in loaded.state_dict().items():
        if "quantizer" not in name:
            assert value.dtype == state[name].dtype
    again = tmp_path / "again.safetensors"
    lq.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_what_a_quantized_layer_stores(tmp_path):
    model = quantized(Upsampling, per_channel_weights=True)
    with safetensors.safe_open(saved(tmp_path, model), "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    codes = layer_codes(model)["up1"]
    assert stored["up1.weight_shape"].tolist() == [8, 3, 2, 2]
    packed = stored["up1.weight_packed"]
    assert packed.dtype == torch.int32
    assert packed.shape == words_shape((8, 3, 2, 2), codes.weight_range.bits, 1) == (8, 1)
    assert torch.equal(stored["up1.weight_scale"], codes.weight_range.scale[:, None])
    assert torch.equal(stored["up1.input_scale"], codes.input_range.scale[None])
    assert torch.equal(stored["first.bias"], model.first.bias)
    assert torch.equal(stored["bn.running_var"], model.bn.running_var)
    quantization = {"weight_packed", "weight_scale", "weight_shape", "input_scale"}
    assert {name[4:] for name in stored if name.startswith("up1.")} == quantization


def test_layers_that_stay_in_float_do(tmp_path):
    policy = lq.Policy((LayerBits("expand", 3, 3), LayerBits("project", 5, 4)))
    with pytest.warns(UserWarning, match="left in float"):
        model = quantized(Depthwise, policy=policy)
    loaded = lq.load(saved(tmp_path, model), Depthwise()).eval()
    assert list(lq.quantized_layers(loaded)) == ["expand", "project"]
    assert torch.equal(loaded.depthwise.weight, model.depthwise.weight)
    assert torch.equal(loaded(image()), model(image()))


def test_attention_goes_through_its_layers_where_it_did(tmp_path):
    policy = lq.Policy((LayerBits("first.in_proj", 3, 3), LayerBits("mlp.0", 5, 4)))
    with pytest.warns(UserWarning, match="left in float"):
        model = quantized(Attending, policy=policy)
    loaded = lq.load(saved(tmp_path, model), Attending()).eval()
    assert [type(module) for module in (loaded.first, loaded.second)] == [
        type(module) for module in (model.first, model.second)
    ]
    assert torch.equal(loaded(image()), model(image()))


def test_a_network_that_is_one_layer_comes_back(tmp_path):
    model = quantized(lambda: nn.Linear(8, 4), policy=lq.Policy((LayerBits("", 4, 4),)))
    loaded = lq.load(saved(tmp_path, model), nn.Linear(8, 4))
    assert torch.equal(loaded(image()), model(image()))


def test_a_jointly_prepared_network_comes_back_with_its_policy(tmp_path):
    prepared = lq.prepare(Depthwise(), (2, 4), example_input=image()).train()
    for bits in (2, 4):
        lq.select_bits(prepared, bits)
        prepared(image())
    policy = policy_of(names_of(Depthwise()), ((2, 4), (4, 2)))
    model = lq.apply_policy(prepared, policy).train()
    model(image())
    model.eval()
    loaded = lq.load(saved(tmp_path, model, policy=policy), Depthwise()).eval()
    assert torch.equal(loaded(image()), model(image()))


def guarded(tmp_path):
    """A network with guards of its own, at which its scales are, and its file."""
    model = quantized(Depthwise, scale_max=0.125, per_channel_weights=True)
    for layer in lq.quantized_layers(model).values():
        layer.weight_quantizer.scale_min = 0.03
    with torch.no_grad():
        model.expand.weight_quantizer.scale[0, 0] = -1.0
        model.expand.input_quantizer.scale.fill_(3.0)
        # Its inputs reach the lowest value, which a symmetric range does not have.
        first = model.stem[0].input_quantizer
        first.symmetric = True
        first._decide(signed=True)
        first.scale.fill_(0.01)
    return model, saved(tmp_path, model)


def test_guards_of_scales_are_kept(tmp_path):
    model, path = guarded(tmp_path)
    loaded = lq.load(path, Depthwise()).eval()
    assert torch.equal(loaded(image()), model(image()))
    assert torch.equal(loaded.stem(image()), model.stem(image()))
    layer = loaded.expand
    assert (layer.weight_quantizer.scale_min, layer.weight_quantizer.scale_max) == (0.03, 0.125)
    assert (layer.input_quantizer.scale_min, layer.input_quantizer.scale_max) == (1e-5, 0.125)
    layers = metadata_of(path)["layers"]
    assert layers["expand"]["weight"]["scale_min"] == 0.03
    assert "scale_min" not in layers["expand"]["input"]


# ---------------------------------------------------------------------- what is done with it after


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network and its file."""
    model = quantized(Depthwise, per_channel_weights=True)
    return model, saved(tmp_path_factory.mktemp("packed"), model)


@pytest.fixture
def loaded(network):
    return lq.load(network[1], Depthwise()).eval()


def test_a_loaded_network_is_copied_and_saved_whole(network, loaded):
    expected = network[0](image())
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    for twin in (copy.deepcopy(loaded), torch.load(file, weights_only=False)):
        assert torch.equal(twin(image()), expected)


def test_a_loaded_network_is_compiled_and_exported(network, loaded):
    expected = network[0](image())
    exported = torch.export.export(loaded, (image(),)).module()
    assert torch.equal(exported(image()), expected)
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image()), expected)


def test_a_loaded_network_takes_another_dtype(tmp_path, network, loaded):
    loaded.to(torch.float64)
    ours, theirs = layer_codes(loaded), layer_codes(network[0])
    assert all(torch.equal(ours[name].weights, theirs[name].weights) for name in theirs)
    for dtype in (torch.float64, torch.bfloat16):
        loaded.to(dtype)
        again = lq.load(saved(tmp_path, loaded, overwrite=True), Depthwise()).eval()
        assert torch.equal(again(image(dtype)), loaded(image(dtype)))


def test_a_loaded_network_is_trained_further(network, loaded):
    before = copy.deepcopy(loaded.state_dict())
    lq.finetune(loaded, [(image(), torch.arange(4))], epochs=3, lr=0.1)
    moved = {
        name for name, value in loaded.state_dict().items() if not torch.equal(value, before[name])
    }
    for name in lq.quantized_layers(loaded):
        parameters = ("weight", "weight_quantizer.scale", "input_quantizer.scale")
        assert moved >= {f"{name}.{parameter}" for parameter in parameters}


def test_gradients_are_those_of_the_network_that_was_saved_within_the_range(network, loaded):
    # Weights beyond the range get none; those within it were only rounded.
    model = network[0]
    for one in (model, loaded):
        one.zero_grad()
        one(image()).sum().backward()
    ours, theirs = loaded.project.weight.grad, model.project.weight.grad
    assert torch.equal(ours[theirs != 0], theirs[theirs != 0])


def test_training_mode_and_what_is_trained_are_those_of_the_float_model(network):
    float_model = Depthwise().eval()
    float_model.stem.requires_grad_(False)
    loaded = lq.load(network[1], float_model)
    assert not any(module.training for module in loaded.modules())
    assert not loaded.stem[0].weight.requires_grad
    assert loaded.project.weight.requires_grad


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel]
)
def test_a_wrapped_network_is_stored_as_itself(tmp_path, network, wrap):
    path = saved(tmp_path, wrap(network[0]))
    assert path.read_bytes() == network[1].read_bytes()
    loaded = lq.load(path, wrap(Depthwise())).eval()
    assert torch.equal(loaded(image()), network[0](image()))


def test_a_tied_weight_stays_float_where_it_is(tmp_path):
    model = quantized(Tied)
    loaded = lq.load(saved(tmp_path, model), Tied())
    assert torch.equal(loaded.tokens.weight, model.tokens.weight)
    assert not torch.equal(loaded.head.weight, model.head.weight)


def test_the_float_network_is_made_by_its_name(tmp_path):
    model = quantized(lambda: CifarResNet(1, width=4, num_classes=3))
    path = saved(tmp_path, model, name="cifar_resnet")
    loaded = lq.load(path, "cifar_resnet", blocks=1, width=4, num_classes=3).eval()
    assert torch.equal(loaded(image()), model(image()))
    with pytest.raises(TypeError, match="options are for a network by name: 'width'"):
        lq.load(path, CifarResNet(), width=4)


def test_a_shared_layer_stays_shared(tmp_path):
    loaded = lq.load(saved(tmp_path, quantized(Shared)), Shared())
    assert loaded.again is loaded.block


# --------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("make", NETWORKS)
def test_the_words_take_what_the_policy_promised_but_for_their_padding(tmp_path, make):
    model = quantized(make)
    costs = lq.profile(make(), image())
    layers = lq.quantized_layers(model).items()
    bits = {name: (layer.weight_bits, layer.activation_bits) for name, layer in layers}
    header = read_header(saved(tmp_path, model))
    # A row, or a column, ends with a word that 31 bits may be left of.
    padding = sum(min(shape[0], math.prod(shape[1:])) for shape in header.shapes.values()) * 31 / 8
    assert 0 <= header.packed_bytes() - costs.size_bits(bits) / 8 <= padding


def test_a_row_that_fills_its_words_takes_nothing_else(tmp_path):
    make = lambda: nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 96), nn.Linear(96, 32))  # noqa: E731
    model = quantized(make, policy=policy_of(["0", "1", "2"], ((3, 4),)))
    header = read_header(saved(tmp_path, model))
    assert header.packed_bytes() == (8 * 64 * 8 + 64 * 96 * 3 + 96 * 32 * 8) / 8


# ------------------------------------------------------------------------------------ what is kept


def test_the_policy_and_the_architecture_are_kept(tmp_path):
    bits = policy_of(names_of(Depthwise()))
    policy = lq.Policy(bits.layers, bits.fixed, 1.5, 1.5, 0.0, meta={"seconds": [1, {"a": None}]})
    model = quantized(Depthwise, policy=policy)
    path = saved(tmp_path, model, policy=policy, name="tests:Depthwise")
    network = read_header(path).network
    assert network.policy == policy
    assert network.architecture == "Depthwise"
    assert network.model == "tests:Depthwise"
    assert network.bits() == {name: policy.bits()[name] for name in network.layers}


def test_a_header_is_read_without_torch(network):
    program = (
        "import sys; from limpq_ext.values.packed_files import read_header;"
        " print(len(read_header(sys.argv[1]).shapes), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(network[1])]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split() == ["5", "False"]


# --------------------------------------------------------------------------------- what is refused


def test_nothing_is_overwritten_unasked(tmp_path, network):
    path = tmp_path / "network.safetensors"
    path.write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"safetensors' exists and is not replaced: overwrite="
    ):
        lq.save(network[0], path)
    assert path.read_text() == "mine"
    lq.save(network[0], path, overwrite=True)
    assert path.read_bytes() == network[1].read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    path = tmp_path / "file"
    writing = open_atomically(path, overwrite=False)
    writing.__enter__().write(b"ours")
    path.write_text("theirs")
    with pytest.raises(FileExistsError, match="is not replaced"):
        writing.__exit__(None, None, None)
    assert path.read_text() == "theirs"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, network, overwrite):
    path = tmp_path / "network.safetensors"
    if overwrite:
        path.write_text("former")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError):
            lq.save(network[0], path, overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["former"] * overwrite


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.expand)
    return model


def with_nan(model):
    model.bn1.running_mean[0] = torch.nan
    return model


def with_infinite_bias(model):
    model.project.bias.data[0] = torch.inf
    return model


def with_relu(model):
    model.project.input_quantizer.relu_max = 6.0
    return model


class WithState(Depthwise):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def prepared(bits):
    return lq.prepare(Depthwise(), bits, example_input=image())


def depthwise(bits=((4, 4),), make=Depthwise):
    return quantized(make, policy=policy_of(names_of(Depthwise()), bits))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: depthwise(((9, 4),)), "at most 8 bits, but 9 are asked for in 'expand', 'depth"),
        (lambda: prepared((2, 4)), r"layer 'expand' has several bit-widths, \(2, 4\) and \(2, 4\)"),
        (lambda: prepared((4,)), "the network was prepared for several bit-widths"),
        (Depthwise, "Depthwise has no quantized layers: give it a policy first"),
        (lambda: quantized(lambda: weight_norm(Depthwise())), "'expand' computes its weight"),
        (lambda: with_nan(depthwise()), r"'bn1\.running_mean' has values that are NaN or inf"),
        (lambda: with_infinite_bias(depthwise()), r"'project\.bias' has values that are NaN"),
        (lambda: with_relu(depthwise()), "'project' has quantizers that apply_policy does not"),
        (lambda: depthwise(make=WithState), "'_extra_state' of the network's state is no tensor"),
    ],
)
def test_what_cannot_be_packed_is_said_before_anything_is_written(tmp_path, make, reason):
    with pytest.raises(ValueError, match=reason):
        lq.save(make(), tmp_path / "network.safetensors")
    assert not list(tmp_path.iterdir())


def test_weights_that_half_precision_does_not_hold_are_said(tmp_path):
    model = quantized(Depthwise, torch.float16)
    with torch.no_grad():
        # -2 steps of this size are beyond the largest number.
        model.expand.weight.fill_(-65000.0)
        model.expand.weight_quantizer.scale.fill_(40000.0)
    with pytest.raises(ValueError, match="layer 'expand' has weights that are NaN or infinite"):
        lq.save(model, tmp_path / "network.safetensors")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: lq.Policy(p.layers[1:], p.fixed), "no bits for the quantized layer 'expand'"),
        (lambda p: lq.Policy((*p.layers, LayerBits("x", 4, 4)), p.fixed), "bits for 'x', which"),
        (
            lambda p: lq.Policy((LayerBits("expand", 4, 3), *p.layers[1:]), p.fixed),
            "layer 'expand' is at W4A4, the policy has W4A3",
        ),
        (lambda p: lq.Policy(p.layers, p.fixed, meta={"a": math.nan}), "not written: policy: "),
        (lambda p: lq.Policy(p.layers, p.fixed, meta={"a": {1}}), "not written: policy: "),
    ],
)
def test_a_policy_of_other_bits_is_said(tmp_path, change, reason):
    policy = policy_of(names_of(Depthwise()), ((4, 4),))
    model = quantized(Depthwise, policy=policy)
    with pytest.raises((ValueError, TypeError), match=reason):
        lq.save(model, tmp_path / "network.safetensors", policy=change(policy))
    assert not list(tmp_path.iterdir())


class Other(Depthwise):
    def __init__(self, change):
        super().__init__()
        change(self)


def instead(**modules):
    def change(model):
        for name, module in modules.items():
            setattr(model, name, module)

    return change


def whole_numbers(model):
    del model.bn1.weight
    model.bn1.register_buffer("weight", torch.ones(16, dtype=torch.int8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            instead(expand=nn.Identity()),
            "it has the quantized layer 'expand', the network Identity",
        ),
        (
            lambda model: delattr(model, "expand"),
            "it has the quantized layer 'expand', the network no layer",
        ),
        (
            instead(head=nn.Linear(8, 7)),
            r"layer 'head' has weights of shape \(5, 8\), the network's has \(7, 8\)",
        ),
        (instead(bn1=nn.Identity()), r"the network has no 'bn1\.bias', 'bn1\.num_batches_tracked'"),
        (instead(new=nn.Linear(2, 2)), r"it lacks 'new\.weight'"),
        (
            instead(bn1=nn.BatchNorm2d(3)),
            r"'bn1\.weight' has shape \(16,\), the network's has \(3,\)",
        ),
        (whole_numbers, r"'bn1\.weight' is torch\.float32, the network's is torch\.int8"),
        (weight_norm, "layer 'expand' computes its weight from other tensors"),
    ],
)
def test_a_file_of_another_architecture_names_what_differs_first(network, change, reason):
    with pytest.raises(lq.FileFormatError, match=f"safetensors: is not of this Other: .*{reason}"):
        lq.load(network[1], Other(change))


@pytest.mark.parametrize(
    ("make", "kind", "reason"),
    [
        (lambda: depthwise(), ValueError, "float_model is quantized: give the float network"),
        (lambda: Depthwise().to("meta"), ValueError, r"has no memory for 'stem\.0\.weight'"),
        (lambda: "resnet17", ValueError, "unknown model 'resnet17': expected 'cifar_resnet', "),
        (lambda: None, TypeError, "float_model is a NoneType, expected a network or a name"),
    ],
)
def test_what_is_no_float_network_is_said(network, make, kind, reason):
    with pytest.raises(kind, match=reason):
        lq.load(network[1], make())


# ------------------------------------------------------------------------------------ broken files


def metadata_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY])


def rewritten(folder, source, change):
    """The file with its tensors and metadata changed."""
    tensors, metadata = safetensors.load_file(source), metadata_of(source)
    change(tensors, metadata)
    path = folder / "changed.safetensors"
    safetensors.save_file(tensors, path, {KEY: json.dumps(metadata)})
    return path


def layer(change):
    return lambda tensors, metadata: change(metadata["layers"]["expand"])


def weight(**changes):
    return layer(lambda told: told["weight"].update(changes))


def tensor(name, value):
    return lambda tensors, metadata: tensors.update({name: value})


def scale(value):
    return lambda tensors, metadata: tensors["expand.weight_scale"][2].fill_(value)


LARGE = torch.tensor([10**6, 10**6, 1, 1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t, m: m.update(format="other"), 'format: is "other"; this limpq_ext reads'),
        (lambda t, m: m.update(version=2), "version: is 2; this limpq_ext reads version 1"),
        (lambda t, m: m.update(extra=1), "extra: unknown key"),
        (lambda t, m: m.pop("architecture"), "architecture: is missing"),
        (lambda t, m: m.update(layers={}), "there are no quantized layers"),
        (layer(lambda told: told.update(output=1)), r"layers\.expand\.output: unknown key"),
        (weight(bits=9), r"layers\.expand\.weight: 9 bits, packed weights have at most 8"),
        (weight(bits=1), r"layers\.expand\.weight: .*1"),
        (weight(bits="4"), r'layers\.expand\.weight\.bits: .*, got "4"'),
        (weight(bits=4), r"tensor 'expand\.weight_packed' is I32 of shape .*for 4 bits"),
        (weight(packed_dim=2), r"layers\.expand\.weight\.packed_dim: .*0 or 1, got 2"),
        (weight(packed_dim=1), r"tensor 'expand\.weight_packed' is I32 of shape \(1, 8\), expect"),
        (weight(dtype="int8"), r"layers\.expand\.weight\.dtype: .*got \"int8\""),
        (weight(dtype="float64"), r"'expand\.weight_scale' is F32 .*expected F64"),
        (weight(channel_axis=4), r"layer 'expand': channel_axis is 4, its weight has shape"),
        (weight(channel_axis=-1), r"layer 'expand': channel_axis is -1"),
        (weight(channel_axis=1), r"'expand\.weight_scale' is F32 of shape \(16, 1\), expected"),
        (weight(scale_min=-1.0), r"weight: scale_min is -1.0, expected a positive number"),
        (weight(scale_min=2.0, scale_max=1.0), "scale_min is 2.0, above scale_max, 1.0"),
        (weight(scale_min=1e3), r"'expand\.weight_scale' has step sizes that are not from 1000\.0"),
        (layer(lambda told: told["input"].update(bits=17)), r"layers\.expand\.input: .*17"),
        (layer(lambda told: told["input"].update(signed=1)), r"layers\.expand\.input\.signed: "),
        (layer(lambda told: told.pop("input")), r"layers\.expand\.input: is missing"),
        (lambda t, m: m["layers"].update(x=m["layers"]["head"]), r"no tensor 'x\.weight_packed', "),
        (scale(0.0), r"'expand\.weight_scale' has step sizes that are not positive"),
        (scale(-1.0), r"'expand\.weight_scale' has step sizes that are not positive"),
        (scale(math.nan), r"'expand\.weight_scale' has step sizes that are not positive"),
        (scale(math.inf), r"'expand\.weight_scale' has step sizes that are not positive"),
        (tensor("head.input_scale", torch.zeros(1)), r"'head\.input_scale' has step sizes that"),
        (tensor("head.input_scale", torch.ones(2)), r"'head\.input_scale' is F32 of shape \(2,\)"),
        (tensor("expand.weight_shape", LARGE), r"'expand\.weight_packed' is .*\(1000000, 1000000"),
        (tensor("expand.weight_shape", torch.tensor([2**40, 2**40])), r"expected I32 of shape"),
        (tensor("expand.weight_shape", torch.tensor([-16, 8])), "expected sizes of 1 or more"),
        (tensor("expand.weight_shape", torch.tensor([16, 0, 1, 1])), "expected sizes of 1 or more"),
        (tensor("expand.weight_shape", torch.ones(9).long()), "expected I64 of 2 to 5 sizes"),
        (tensor("expand.weight_shape", torch.tensor([16.0, 8.0])), "expected I64 of 2 to 5 sizes"),
        (
            tensor("expand.weight_shape", torch.tensor([16, 2, 2, 2])),
            r"layer 'expand' has weights o",
        ),
        (tensor("expand.weight", torch.ones(16, 8, 1, 1)), "layer 'expand': has weights twice"),
        (tensor("new", torch.ones(1)), "the network has no 'new'"),
        (
            tensor("project.bias", torch.full((8,), math.nan)),
            r"'project\.bias' has values that are",
        ),
        (tensor("new", torch.ones(1, dtype=torch.complex64)), 'dtype is "C64", not that of plain'),
        (lambda t, m: t.pop("bn1.bias"), r"is not of this Depthwise: it lacks 'bn1\.bias'"),
        (
            lambda t, m: m.update(policy=policy_document(weight_bits=5)),
            "policy: .*'expand' is at W2A16, the policy has W5A16",
        ),
        (lambda t, m: m.update(policy=policy_document(weight_bits=99)), r"policy\.layers\[0\]: "),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_what_is_wrong(tmp_path, network, change, reason):
    path = rewritten(tmp_path, network[1], change)
    with pytest.raises(lq.FileFormatError, match=f"^{path}: .*{reason}"):
        lq.load(path, Depthwise())


def policy_document(weight_bits):
    names = names_of(Depthwise())
    policy = policy_of(names)
    layers = [
        {"name": x.name, "weight_bits": x.weight_bits, "activation_bits": x.activation_bits}
        for x in policy.layers
    ]
    layers[0]["weight_bits"] = weight_bits
    fixed = [{"name": x.name, "weight_bits": 8, "activation_bits": 8} for x in policy.fixed]
    return {"layers": layers, "fixed": fixed}


def test_a_code_below_a_symmetric_range_is_refused(tmp_path):
    path = saved(tmp_path, quantized(Depthwise, symmetric_weights=True))
    changed = rewritten(tmp_path, path, lambda t, m: t["expand.weight_packed"].zero_())
    with pytest.raises(lq.FileFormatError, match="'expand': a weight is below the symmetric range"):
        lq.load(changed, Depthwise())


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="U8", shape=(1,), begin=0, end=1, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its header has 0 bytes, the file 0"),
        (raw({}, length=10**15), "its header has 1000000000000000 bytes, the file 10"),
        (raw(b"[" * 100_000), "is nested too deeply"),
        (raw(b'{"a":' * 80 + b"1" + b"}" * 80), "nested more than 64 deep"),
        (raw(b'{"a": 1, "a": 1}'), "field 'a' stands twice"),
        (raw(b"[]"), r"its header is \[\], not a JSON object"),
        (raw({"a": 1}), "tensor 'a': is 1, expected dtype, shape and data_offsets"),
        (raw({"a": entry(other=1)}, b"0"), "expected dtype, shape and data_offsets"),
        (raw({"a": entry("F128")}, b"0"), 'dtype is "F128", not that of plain real numbers'),
        (raw({"a": entry(shape=(-1,))}, b"0"), r"shape is \[-1\], expected whole numbers"),
        (raw({"a": entry(shape=(2**62,) * 60)}, b"0"), "has 1 bytes, U8 of shape"),
        (raw({"a": entry(shape=(10**90,))}, b"0"), "expected whole numbers"),
        (raw({"a": entry(shape=(10**12,), end=10**12)}, b"0"), "its tensors end at byte 1000000"),
        (raw({"a": entry(), "b": entry()}, b"0"), "tensor 'b' begins at byte 0, expected 1"),
        (raw({"a": entry(begin=1, end=2)}, b"00"), "tensor 'a' begins at byte 1, expected 0"),
        (raw({"a": entry()}, b"00"), "its tensors end at byte"),
        (raw({"a": entry()}, b"0"), "is no packed network: its metadata have no 'limpq-packed'"),
        (raw({"__metadata__": {KEY: "{}", "x": "y"}}), "metadata: unknown key 'x'"),
        (raw({"__metadata__": {KEY: 1}}), "metadata: 'limpq-packed' is 1, expected a text"),
        (raw({"__metadata__": {KEY: "["}}), "Expecting value"),
        (raw({"__metadata__": {KEY: "[" * 100_000}}), "is nested too deeply"),
        (raw({"__metadata__": {KEY: "[]"}}), r"'limpq-packed' holds \[\], not a JSON object"),
        (raw({"__metadata__": {KEY: "{}"}}), "format: is missing, not a limpq-packed file"),
    ],
)
def test_a_hostile_header_is_refused_by_itself(tmp_path, content, reason):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(lq.FileFormatError, match=f"^{path}: .*{reason}"):
        lq.load(path, Depthwise())


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        lq.load(tmp_path / "network.safetensors", Depthwise())
