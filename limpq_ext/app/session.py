"""A recipe in memory: its device, its data, and its network in all forms that stages need."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limpq_ext.app.recipe import Recipe
from limpq_ext.app.weights import load_weights, save_weights
from limpq_ext.conversion.apply import apply_policy
from limpq_ext.conversion.prepare import prepare
from limpq_ext.data.datasets import DataOptions, load_data
from limpq_ext.data.loading import Data
from limpq_ext.graph.fingerprint import graph_digest, source_digest, structure_digest
from limpq_ext.graph.profile import profile
from limpq_ext.nn.named import create_model, is_published
from limpq_ext.training.distributed import broadcast_state, from_main
from limpq_ext.values.costs import Costs
from limpq_ext.values.policy import Policy


class Session:
    """A recipe with its device, its data and its network; data and device are set up once.

    Args:
        recipe: What to do.
        scan_cache: Where it is remembered which image files can be read.

    Raises:
        ValueError: The data set or the device is unknown, the model does not exist, or the data are
            not as they should be.
        FileNotFoundError: There are no data.
    """

    def __init__(self, recipe: Recipe, *, scan_cache: Path | None = None) -> None:
        self.recipe = recipe
        self.device = choose_device(recipe.device)
        options = recipe.data.model_dump(exclude={"workers", "fraction"})
        self.data: Data = load_data(DataOptions(**options), scan_cache=scan_cache)
        self.create_model()

    @cached_property
    def network_key(self) -> dict[str, Any]:
        """What the network is: digests of its graph, its modules and its source."""
        model, name = self.create_model(), self.recipe.model.name
        return {
            **self.origin,
            "structure": structure_digest(model),
            "source": source_digest(model, name.partition(":")[0] if ":" in name else None),
        }

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What the metadata of weights say of the network that they are of.

        Nothing, where its forward cannot be followed: it can be evaluated all the same.
        """
        try:
            graph = graph_digest(self.create_model(), self.example_input())
        except ValueError:
            return {}
        return {"graph": graph, "input_shape": list(self.data.image_shape)}

    def common_key(self) -> dict[str, Any]:
        """What every stage depends on."""
        part = self.recipe.model_dump(mode="json", include={"seed", "model"})
        return {**part, "network": self.network_key, "data": self.data_key()}

    def fraction_key(self) -> Any:
        """What part of the training images the indicators are trained on."""
        data = self.recipe.data
        return {"fraction": data.fraction, "seed": data.seed if data.fraction < 1 else None}

    def save(self, model: nn.Module, path: Path) -> None:
        """Write weights, with what they are of."""
        save_weights(model, path, network=self.origin)

    def load(self, model: nn.Module, path: Path) -> None:
        """Load weights, which have to be of this network where they say of which they are."""
        load_weights(model, path, network=self.origin)

    def data_key(self) -> dict[str, Any]:
        """What a stage depends on of the data: not where they are or who loads them."""
        included = {"image_size", "channels", "augment", "mean", "std", "on_corrupt"}
        options = self.recipe.data.model_dump(mode="json", include=included)
        return {**options, "fingerprint": self.data.record["fingerprint"]}

    def seed(self, process: int = 0) -> None:
        """Seed torch, for weights and for all that a training draws beside its batches."""
        torch.manual_seed(self.recipe.seed + process)

    def create_model(self) -> nn.Module:
        """The recipe's model with random weights from its seed, on the CPU."""
        self.seed()
        return model_for(self.recipe, self.data)

    def float_model(self, weights: Path) -> nn.Module:
        """The float model with weights from a file, on the device; process 0 reads the file."""
        model = self.create_model()
        from_main(lambda: self.load(model, weights))
        model.to(self.device)
        broadcast_state(model)
        return model

    def given_float(self) -> nn.Module:
        """The float model with the weights that the recipe names, on the device.

        Raises:
            FileNotFoundError: They are a file that does not exist.
            FileFormatError: They are not of this model.
            ConnectionError: They could not be downloaded.
        """
        weights = self.recipe.model.weights
        assert weights is not None
        if not is_published(weights):
            return self.float_model(Path(weights))
        model = self.create_model()

        def download() -> None:
            published = model_for(self.recipe, self.data, weights=weights)
            model.load_state_dict(published.state_dict())

        from_main(download)
        model.to(self.device)
        broadcast_state(model)
        return model

    def network(self, weights: Path, policy: Policy | None) -> nn.Module:
        """A network with weights from a file, on the device; process 0 reads the file.

        Args:
            weights: Of the float network, or of the policy's.
            policy: Its bits; None: the float network.
        """
        if policy is None:
            return self.float_model(weights)
        model = self.quantize(self.create_model(), policy)
        from_main(lambda: self.load(model, weights))
        model.to(self.device)
        broadcast_state(model)
        return model

    def prepare(self, model: nn.Module) -> nn.Module:
        """A float model with the recipe's candidate bits, on the device."""
        options = self.recipe.quantization
        prepared = prepare(
            model,
            self.recipe.bits,
            example_input=self.example_input(),
            fixed=options.fixed,
            exclude=options.exclude,
            **self.quantizers(),
        )
        return prepared.to(self.device)

    def quantize(self, model: nn.Module, policy: Policy) -> nn.Module:
        """A float or prepared model at the bits of a policy."""
        return apply_policy(model, policy, **self.quantizers())

    def profile(self) -> Costs:
        """The costs of the model."""
        options = self.recipe.quantization
        return profile(
            self.create_model(),
            self.example_input(),
            fixed=options.fixed,
            exclude=options.exclude,
        )

    def uniform_policy(self, costs: Costs) -> Policy:
        """The baseline's policy."""
        level = self.recipe.baseline
        return Policy.uniform(costs, level.weight_bits, level.activation_bits)

    def quantizers(self) -> dict[str, Any]:
        """The options of all quantizers, as `prepare` and `apply_policy` take them."""
        options = self.recipe.quantization.model_dump(exclude={"fixed", "exclude"})
        if options["scale_max"] is None:
            options["scale_max"] = math.inf
        return options

    def example_input(self) -> torch.Tensor:
        """One empty image."""
        return torch.zeros(1, *self.data.image_shape)


def model_for(recipe: Recipe, data: Data, *, weights: str | None = None) -> nn.Module:
    """The recipe's model, with the classes (and for cifar_resnet the channels) of its data.

    Args:
        recipe: The recipe.
        data: Its data.
        weights: Published weights by name; None: random ones.

    Raises:
        ValueError: The recipe gives the model another number of classes, or it does not exist.
    """
    options = {"num_classes": data.num_classes, **recipe.model.options}
    if options["num_classes"] != data.num_classes:
        raise ValueError(
            f"model.options.num_classes is {options['num_classes']}, but the data set"
            f" {recipe.data.name} has {data.num_classes} classes"
        )
    if recipe.model.name == "cifar_resnet":
        options.setdefault("in_channels", data.image_shape[0])
    return create_model(recipe.model.name, weights=weights, **options)


def choose_device(name: str) -> torch.device:
    """The device of a recipe: "auto" is CUDA where there is one.

    In a run of several processes "auto" and "cuda" are the GPU of this process.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device '{name}': expected auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device '{name}' is not supported: expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device '{name}': torch finds no CUDA device here")
    return device
