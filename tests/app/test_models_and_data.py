import contextlib
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from limpq_ext.app.weights import load_weights, save_weights
from limpq_ext.conversion.apply import apply_policy
from limpq_ext.data.datasets import load_data
from limpq_ext.data.loading import make_loader
from limpq_ext.nn.named import CifarResNet, create_model, create_shapes, is_published
from limpq_ext.values.policy import Policy
from limpq_ext.values.reading import FileFormatError


def test_the_small_resnet_has_the_depth_it_says():
    model = CifarResNet(2, in_channels=1)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 14
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_torchvision_models_come_by_name():
    assert create_model("mobilenet_v2", num_classes=7).classifier[1].out_features == 7


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "unknown model 'resnet19': expected 'cifar_resnet', a torchvision"),
        ("cifar_resnet", {"depth": 3}, "model 'cifar_resnet': .*'depth'"),
        ("cifar_resnet", {"blocks": 0}, "blocks is 0"),
        ("fasterrcnn_resnet50_fpn", {}, "unknown model"),
    ],
)
def test_wrong_models_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "wrapped.pt"])
def test_weights_survive_a_file(tmp_path, name):
    model, path = CifarResNet(1), tmp_path / name
    if name == "weights.safetensors":
        save_weights(model, path)
    elif name == "weights.pt":
        torch.save(model.state_dict(), path)
    else:
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, path)
    other = CifarResNet(1)
    load_weights(other, path)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


class Foreign:
    pass


def test_unreadable_weights_are_errors_that_name_the_file(tmp_path):
    model = CifarResNet(1)
    with pytest.raises(FileNotFoundError, match=r"weights '.*none\.pt' do not exist"):
        load_weights(model, tmp_path / "none.pt")
    for name in ("broken.safetensors", "broken.pt"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(FileFormatError, match=name + ": not a"):
            load_weights(model, tmp_path / name)
    save_weights(model, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileFormatError, match=r"cut\.safetensors: not a safetensors file"):
        load_weights(model, tmp_path / "cut.safetensors")
    torch.save(Foreign(), tmp_path / "foreign.pt")
    with pytest.raises(FileFormatError, match=r"foreign\.pt: not a readable checkpoint"):
        load_weights(model, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(FileFormatError, match="holds no state_dict"):
        load_weights(model, tmp_path / "list.pt")


def test_weights_of_another_network_are_an_error(tmp_path):
    save_weights(CifarResNet(1), tmp_path / "small.safetensors")
    with pytest.raises(FileFormatError, match=r"lacks 'layer1\.1\.conv1\.weight'"):
        load_weights(CifarResNet(2), tmp_path / "small.safetensors")
    with pytest.raises(FileFormatError, match="size mismatch for fc"):
        load_weights(CifarResNet(1, num_classes=3), tmp_path / "small.safetensors")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 2).long(), r"'weight' is torch\.int64, the model's torch\.float32"),
        (torch.zeros(2, 2).bool(), r"'weight' is torch\.bool"),
        (torch.zeros(2, 2) + 1j, "tensor 'weight' is complex"),
    ],
)
def test_weights_of_another_kind_are_not_converted(tmp_path, name, value, message):
    state = {"weight": value, "bias": torch.zeros(2)}
    if name.endswith("pt"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    with pytest.raises(FileFormatError, match=rf"{name}: {message}"):
        load_weights(nn.Linear(2, 2), tmp_path / name)


@pytest.mark.parametrize("key", [3, None, ("weight",)])
def test_weights_whose_names_are_no_strings_are_refused(tmp_path, key):
    torch.save({key: torch.zeros(2, 2)}, tmp_path / "w.pt")
    with pytest.raises(FileFormatError, match=r"w\.pt: holds no state_dict"):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt")


def policy_of(weight_bits):
    return Policy.uniform(["layer1.0.conv1", "layer2.0.conv2"], weight_bits, 4)


def quantized(model, weight_bits, **options):
    with pytest.warns(UserWarning, match="left in float"):
        return apply_policy(model, policy_of(weight_bits), **options)


def test_weights_of_a_policy_do_not_load_at_other_bits(tmp_path):
    path = tmp_path / "tuned.safetensors"
    model = CifarResNet(1)
    save_weights(quantized(model, 3), path)
    load_weights(quantized(model, 3), path)
    for other, shown in (
        (quantized(model, 2), "W2 A4"),
        (quantized(model, 3, symmetric_weights=True), "W3 symmetric A4"),
        (quantized(model, 3, scale_max=1.0), "W3 up to 1.0 A4 up to 1.0"),
    ):
        with pytest.raises(FileFormatError, match="trained at other bits") as caught:
            load_weights(other, path)
        assert f"layer 'layer1.0.conv1' at W3 A4, not {shown} (and 1 more layers)" in str(
            caught.value
        )


def test_weights_do_not_load_into_a_network_that_computes_something_else(tmp_path):
    path = tmp_path / "weights.safetensors"
    network = {"graph": "one", "input_shape": [3, 8, 8]}
    save_weights(CifarResNet(1), path, network=network)
    load_weights(CifarResNet(1), path, network=network)
    load_weights(CifarResNet(1), path)
    load_weights(CifarResNet(1), path, network={"graph": "two", "input_shape": [3, 16, 16]})
    with pytest.raises(FileFormatError, match="were trained in another network"):
        load_weights(CifarResNet(1), path, network={**network, "graph": "two"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_not_finite_are_an_error(tmp_path, value, suffix):
    model, path = CifarResNet(1), tmp_path / f"weights.{suffix}"
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = value
    torch.save(model.state_dict(), path) if suffix == "pt" else save_weights(model, path)
    with pytest.raises(FileFormatError, match=r"'conv1\.weight' has values that are NaN or inf"):
        load_weights(CifarResNet(1), path)


def test_a_buffer_may_be_infinite_as_masks_are(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    save_weights(model, tmp_path / "weights.safetensors")
    load_weights(model, tmp_path / "weights.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_weights(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def fail(tensors, metadata):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(nn.Linear(2, 2), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_digits_are_split_the_same_way_every_time():
    first, second = load_data("digits"), load_data("digits")
    assert (len(first.train), len(first.val), len(first.test)) == (1212, 135, 450)
    assert first.image_shape == (1, 8, 8)
    assert first.record == second.record
    for ours, theirs in zip(first.test, second.test, strict=True):
        assert torch.equal(ours[0], theirs[0])
    training = torch.stack([image for image, _ in [*first.train, *first.val]])
    assert training.mean().abs() < 1e-5
    assert min(first.record["images_per_class"]["test"]) >= 43
    seen = {image.numpy().tobytes() for image in training}
    assert sum(image.numpy().tobytes() in seen for image, _ in first.test) == 0


def test_loaders_shuffle_by_seed_and_leave_out_a_last_batch_that_is_not_full():
    data = load_data("digits")
    order = [
        torch.cat([t for _, t in make_loader(data.train, batch_size=64, train=True, seed=seed)])
        for seed in (0, 0, 1)
    ]
    assert torch.equal(order[0], order[1])
    assert not torch.equal(order[0], order[2])
    assert len(order[0]) == 18 * 64
    whole = list(make_loader(data.test, batch_size=64, train=False))
    assert sum(len(target) for _, target in whole) == 450


def test_wrong_data_is_named():
    with pytest.raises(ValueError, match="unknown data set 'imagenet22k': expected one of digits"):
        load_data("imagenet22k")
    empty = torch.utils.data.TensorDataset(torch.zeros(0, 1), torch.zeros(0))
    with pytest.raises(ValueError, match="the data set is empty"):
        make_loader(empty, batch_size=4, train=True)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make_loader(load_data("digits").test, batch_size=0, train=False)


def test_close_names_are_suggested():
    with pytest.raises(ValueError, match=r"unknown model 'resnet19': .*similar: resnet"):
        create_model("resnet19")


def test_models_of_timm_come_by_name():
    pytest.importorskip("timm")
    model = create_model("timm/mobilenetv1_100", num_classes=7)
    assert model.get_classifier().out_features == 7
    with pytest.raises(ValueError, match=r"timm has no such model; similar: mobilenetv1_100"):
        create_model("timm/mobilenetv1_10")
    with pytest.raises(ValueError, match="weights of 'timm/resnet18' are None or 'DEFAULT'"):
        create_model("timm/resnet18", weights="IMAGENET1K_V1")


def own_network(num_classes=10):
    return nn.Linear(3, num_classes)


def not_a_network():
    return 3


def test_a_model_of_ones_own_is_a_function_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(
        "import torch\n\ndef tiny(width=4):\n    return torch.nn.Linear(3, width)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place])
    before = list(sys.path)
    with pytest.raises(ImportError, match="cannot import 'my_networks'"):
        create_model("my_networks:tiny")
    assert sys.path == before
    monkeypatch.syspath_prepend(tmp_path)
    assert create_model("my_networks:tiny", width=6).out_features == 6
    assert create_model("limpq_ext.nn.named:CifarResNet", blocks=1).fc.out_features == 10


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("no.such_module:tiny", {}, ImportError, "cannot import 'no.such_module'"),
        (f"{__name__}:nothing", {}, ValueError, "has no function 'nothing'"),
        (f"{__name__}:own_network", {"depth": 3}, ValueError, "unexpected keyword.*'depth'"),
        (f"{__name__}:not_a_network", {}, TypeError, "returned a int, expected a torch"),
        (f"{__name__}:own_network", {"weights": "DEFAULT"}, ValueError, "no published weights of"),
        ("cifar_resnet", {"weights": "DEFAULT"}, ValueError, "no published weights of"),
        ("resnet18", {"weights": "V9"}, ValueError, "no weights 'V9', those are IMAGENET1K_V1"),
    ],
)
def test_wrong_models_of_ones_own_and_wrong_weights_are_named(name, options, error, message):
    with pytest.raises(error, match=message):
        create_model(name, **options)


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
def test_a_download_that_fails_is_one_sentence(tmp_path, monkeypatch, weights):
    import urllib.error

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(
        ConnectionError,
        match=r"of 'resnet18' could not be downloaded \(.*no route to host.*local file",
    ):
        create_model("resnet18", weights=weights)


def test_published_weights_that_were_downloaded_before_are_loaded(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(1)
    published = torchvision.models.squeezenet1_1().state_dict()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / "squeezenet1_1-b8a52dc0.pth"
    torch.save(published, path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = create_model("squeezenet1_1", weights="DEFAULT")
    assert all(torch.equal(published[name], value) for name, value in model.state_dict().items())


@pytest.fixture
def published(monkeypatch):
    """Random weights in the place of those that torchvision publishes, by the network's name."""
    torchvision = pytest.importorskip("torchvision")
    found = {}

    def get_state_dict(weights, *args, **kwargs):
        name = type(weights).__name__.removesuffix("_Weights").lower()
        auxiliary = name in ("googlenet", "inception_v3")
        options = {"init_weights": False, "aux_logits": True} if auxiliary else {}
        found[name] = torchvision.models.get_model(name, **options).state_dict()
        return found[name]

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    return found


@pytest.mark.parametrize("options", [{}, {"num_classes": 1000}, {"num_classes": 3}])
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_published_weights_with_auxiliary_classifiers_load_without_them(name, options, published):
    with contextlib.ExitStack() as stack:
        if options.get("num_classes") == 3:
            stack.enter_context(pytest.warns(UserWarning, match="but those of 'fc' are taken"))
        model = create_model(name, weights="DEFAULT", **options).train()
    scores = model(torch.randn(2, 3, 75, 75))
    assert scores.shape == (2, options.get("num_classes", 1000))
    assert model.transform_input
    state, theirs = create_model(name, init_weights=False, **options).state_dict(), published[name]
    assert model.state_dict().keys() == state.keys()
    weight = "Conv2d_1a_3x3.conv.weight" if name == "inception_v3" else "conv1.conv.weight"
    assert torch.equal(model.get_parameter(weight), theirs[weight])


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_network_is_the_same_with_weights_from_a_file_as_with_published_ones(
    name, published, tmp_path
):
    model = create_model(name, weights="DEFAULT").eval()
    save_weights(model, tmp_path / "weights.safetensors")
    other = create_model(name, init_weights=False).eval()
    load_weights(other, tmp_path / "weights.safetensors")
    x = torch.randn(2, 3, 75, 75)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("squeezenet1_1", "classifier.1"),
        ("mobilenet_v2", "classifier.1"),
        ("resnet18", "fc"),
        ("efficientnet_b0", "classifier.1"),
        ("swin_t", "head"),
    ],
)
def test_published_weights_of_other_classes_load_but_for_the_classifier(name, head, published):
    torch.manual_seed(0)
    message = f"are of 1000 classes: all of them but those of '{head}' are taken.* for 7 classes"
    with pytest.warns(UserWarning, match=message):
        model = create_model(name, weights="DEFAULT", num_classes=7).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    state = model.state_dict()
    assert state.keys() == published[name].keys()
    same = {key for key, value in published[name].items() if torch.equal(value, state[key])}
    assert same == {key for key in state if not key.startswith(f"{head}.")}


def test_weights_of_the_enumeration_of_another_network_are_refused():
    with pytest.raises(ValueError, match=r"'resnet50' has no weights 'ResNet18_Weights.DEFAULT'"):
        create_model("resnet50", weights="ResNet18_Weights.DEFAULT")


def test_names_of_published_weights_are_told_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("DEFAULT", "IMAGENET1K_SWAG_E2E_V1", "ResNet50_Weights.DEFAULT"):
        assert is_published(name)
    for name in ("weights.pt", "runs/DEFAULT.safetensors", "runs/ResNet50_Weights.DEFAULT"):
        assert not is_published(name)
    (tmp_path / "DEFAULT").touch()
    assert not is_published("DEFAULT")


def test_pretrained_networks_of_timm_with_other_classes_say_so(monkeypatch):
    timm = pytest.importorskip("timm")
    original = timm.create_model

    def without_download(name, pretrained=False, **options):
        assert pretrained
        return original(name, **options)

    monkeypatch.setattr(timm, "create_model", without_download)
    with pytest.warns(UserWarning, match="are of 1000 classes: .* but those of 'fc' are taken"):
        model = create_model("timm/resnet18.a1_in1k", weights="DEFAULT", num_classes=7)
    assert model.get_classifier().out_features == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_model("timm/resnet18.a1_in1k", weights="DEFAULT")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_classifiers_give_class_scores_in_training_too(name):
    pytest.importorskip("torchvision")
    model = create_model(name, num_classes=3, init_weights=False).train()
    assert model(torch.zeros(2, 3, 75, 75)).shape == (2, 3)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt"])
def test_names_of_wrapped_models_are_unwrapped(tmp_path, prefix, file):
    from safetensors.torch import save_file

    model = CifarResNet(1)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    if file == "weights.pt":
        torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    other = CifarResNet(1)
    load_weights(other, tmp_path / file)
    assert torch.equal(other.fc.weight, model.fc.weight)


def test_a_module_that_is_called_module_keeps_its_name(tmp_path):
    model = nn.ModuleDict({"module": nn.Linear(2, 3)})
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = nn.ModuleDict({"module": nn.Linear(2, 3)})
    load_weights(other, tmp_path / "weights.pt")
    assert torch.equal(other.module.weight, model.module.weight)


def test_all_that_does_not_fit_is_named(tmp_path):
    torch.save({"a.weight": torch.zeros(2), "b": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(
        FileFormatError,
        match=r"not of this Linear: lacks 'weight', 'bias'; has, unlike .*, 'a\.weight', 'b'",
    ):
        load_weights(nn.Linear(2, 3), tmp_path / "weights.pt")


def test_networks_that_ask_for_the_version_of_their_state_load_from_safetensors(tmp_path):
    model = create_model("mnasnet0_5", num_classes=3)
    save_weights(model, tmp_path / "weights.safetensors")
    other = create_model("mnasnet0_5", num_classes=3)
    load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(other.classifier[1].weight, model.classifier[1].weight)


@pytest.mark.parametrize("name", ["regnet_x_400mf", "vit_h_14", "swin_v2_t", "timm/levit_128s"])
def test_shapes_need_no_memory_for_weights(name):
    pytest.importorskip("timm")
    model = create_shapes(name, num_classes=3)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
