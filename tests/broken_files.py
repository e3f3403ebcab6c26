"""Valid files of every kind that the package reads, broken in seeded ways and read under limits.

    python broken_files.py FOLDER --count N --seed S
    python broken_files.py FOLDER --hostile

The second reads files that somebody made so that reading them takes all memory or for ever.

Reading has to end with a value or with a FileFormatError of one printable line that begins with the
file's name. What ends otherwise is printed as one JSON line each; the last line counts.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import pickle
import random
import re
import resource
import signal
import struct
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn import functional as F

from limpq_ext import (
    Costs,
    FileFormatError,
    Indicators,
    JointTrainer,
    LatencyTable,
    NonFiniteError,
    Policy,
    apply_policy,
    finetune,
    prepare,
    profile,
    search,
)
from limpq_ext.allocation.pareto import Curve, pareto
from limpq_ext.app.recipe import Recipe, dump_recipe, load_recipe, load_restrictions
from limpq_ext.app.weights import load_weights, save_weights
from limpq_ext.export.packed import load as unpack
from limpq_ext.export.packed import save as pack
from limpq_ext.training.checkpoint import Checkpoint, write_sealed
from limpq_ext.training.loop import Recording
from limpq_ext.training.metrics import MetricsFile
from limpq_ext.values.interactions import Interactions
from limpq_ext.values.packed_files import KEY

BITS = (2, 4)
SECONDS = 10
"""Processor time for one file."""
MEGABYTES = 1000
"""Address space for all files, beyond what the process has before the first."""


class OutOfTimeError(BaseException):
    """No Exception, so that no reader takes it for a broken file."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: Name of the file.
        read: Reads a file of that name.
        form: Turns bytes into a value and back, for changes within; None: bytes alone are changed.
    """

    name: str
    read: Callable[[Path], Any]
    form: tuple[Callable[[bytes], Any], Callable[[Any], bytes]] | None = None


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3)
        self.middle = nn.Conv2d(2, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.again = nn.Conv2d(3, 2, 1)
        self.last = nn.Linear(2, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.middle(F.relu(self.first(x)))))
        return self.last(F.relu(self.again(x)).mean((2, 3)))


def make_network():
    torch.manual_seed(0)
    return Network()


BATCHES = [
    (torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3)
]


# ------------------------------------------------------------------------------------------- files


def write_files(folder: Path) -> dict[str, bytes]:
    """A valid file of every kind, by name."""
    example = torch.zeros(1, 1, 8, 8)
    prepared = prepare(make_network(), BITS, example_input=example)
    trainer = JointTrainer(
        prepared, torch.optim.SGD(prepared.parameters(), lr=0.01, momentum=0.9), F.cross_entropy
    )
    trainer.step(*BATCHES[0])
    indicators = trainer.indicators()
    costs = profile(make_network(), example)
    indicators.save(folder / "indicators.json")
    costs.save(folder / "costs.json")
    search(indicators, costs, size=10**6).save(folder / "policy.json")
    pareto(indicators, costs, over="size").save(folder / "curve.json")
    entries = [
        (layer.name, w, a, 1e-3 * w * a) for layer in costs.layers for w in BITS for a in BITS
    ]
    lines = [",".join(map(str, entry)) for entry in entries]
    table = "\n".join(["layer,weight_bits,activation_bits,seconds", *lines, ""])
    (folder / "latency.csv").write_text(table)
    values = {(first, second): first / second for first in BITS for second in BITS}
    tensors = [(layer.name, "weight") for layer in costs.layers]
    Interactions.from_table({tuple(tensors[:2]): values}).save(folder / "interactions.json")
    LatencyTable.load(folder / "latency.csv").save(folder / "latency.json")
    values = {"4": 0.1, "2": 0.4}
    layers = {f"module.{name}": dict(values) for name in ("a", "b")}
    foreign = {"weight": layers, "act": copy.deepcopy(layers), "layer_name": [*layers]}
    (folder / "limpq.pkl").write_bytes(pickle.dumps(foreign))
    state = {"module.conv1.weight": torch.zeros(2, 3)}
    for name in ("module.a", "module.b"):
        state[f"{name}.weight"] = torch.zeros(2, 2)
        state[f"{name}.quan_w_fn.s"] = torch.tensor([0.125, 0.25])
        state[f"{name}.quan_a_fn.s"] = torch.tensor([0.5, 1.0])
    content = {"epoch": 3, "arch": "resnet18", "state_dict": state}
    torch.save(content, folder / "limpq.pth.tar")
    torch.save(content, folder / "legacy.pth.tar", _use_new_zipfile_serialization=False)
    (folder / "limpq.yaml").write_text("name: r18\nweight_bits: [6, 3]\nact_bits: [5, 4]\n")
    torch.save(trainer.state_dict(), folder / "trainer.pt")
    torch.save(make_network().state_dict(), folder / "weights.pt")
    save_weights(make_network(), folder / "weights.safetensors")
    policy = Policy.uniform(costs, 3, 4)
    model = apply_policy(make_network(), policy, per_channel_weights=True).train()
    model(BATCHES[0][0])
    pack(model, folder / "packed.safetensors", policy=policy)
    (folder / "recipe.yaml").write_text(dump_recipe(Recipe()))
    (folder / "restrictions.yaml").write_text(
        "pairs: {'*': [[4, 8], [2, 2]]}\nfixed: {middle: [4, 4]}\n"
        "tied: ['again*']\nmin_bits: {'*': 2}\n"
    )
    done = {"inputs": "0" * 64, "outputs": {"costs.json": "1" * 64}, "seconds": 0.5}
    record = {
        "format": "limpq-run",
        "version": 1,
        "stages": {"profile": {**done, "finished": True}},
    }
    record["files"] = {"recipe.yaml": ["2" * 64]}
    (folder / "stages.json").write_text(json.dumps(record))
    records = [{"stage": stage, "step": step, "loss": 0.5} for stage in "ab" for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    resume(folder / "resume.checkpoint", stop=2)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class StoppedError(Exception):
    pass


def resume(path: Path, stop: int | None = None) -> None:
    """Fine-tune for two steps, or go on from a checkpoint after the first."""

    def on_step(done, total):
        if done == stop:
            raise StoppedError

    recording = Recording(Checkpoint(path, key="key", steps=1, minutes=0))
    # A checkpoint may hold numbers with which nothing can be trained, which the training says.
    with suppress(StoppedError, NonFiniteError):
        finetune(
            make_network(),
            BATCHES,
            epochs=4,
            lr=0.01,
            momentum=0.9,
            recording=recording,
            on_step=on_step,
            ema_decay=0.5,
        )


# ------------------------------------------------------------------------------------------ kinds


def read_json(text: bytes) -> Any:
    return json.loads(text)


def write_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def load_torch(data: bytes) -> Any:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        return torch.load(file, weights_only=True)


def save_torch(value: Any) -> bytes:
    with tempfile.TemporaryFile() as file:
        torch.save(value, file)
        file.seek(0)
        return file.read()


def save_checkpoint(value: Any) -> bytes:
    """With the right checksum, so that what is wrong within is looked at."""
    file = io.BytesIO()
    write_sealed(file, value)
    return file.getvalue()


def save_legacy(value: Any) -> bytes:
    with tempfile.TemporaryFile() as file:
        torch.save(value, file, _use_new_zipfile_serialization=False)
        file.seek(0)
        return file.read()


def load_tensors(data: bytes) -> Any:
    from safetensors.torch import load

    return load(data)


def save_tensors(value: Any) -> bytes:
    from safetensors.torch import save

    return save(value)


def load_packed(data: bytes) -> Any:
    """The header, in which the metadata are no text, and the bytes after it."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"][KEY] = json.loads(header["__metadata__"][KEY])
    return {"header": header, "data": data[8 + length :]}


def save_packed(value: Any) -> bytes:
    header = dict(value["header"])
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and not isinstance(metadata.get(KEY, ""), str):
        header["__metadata__"] = {**metadata, KEY: json.dumps(metadata[KEY])}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + value["data"]


JSON = (read_json, write_json)
YAML = (yaml.safe_load, lambda value: yaml.safe_dump(value).encode())
TORCH = (load_torch, save_torch)


def again(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Reads a file whose value, once it was taken, has to be written and read again."""

    def check(path: Path) -> Any:
        value = read(path)
        other = path.with_name(f"again-{path.stem}.json")
        value.save(other)
        assert type(value).load(other) == value
        return value

    return check


def use_costs(path: Path) -> None:
    costs = again(Costs.load)(path)
    bits = Policy.uniform(costs, 4, 4).bits()
    float(costs.bitops(bits))
    costs.compression(bits)
    if costs.tensors:
        costs.activation_memory_bits(bits)


def read_stages(path: Path) -> Any:
    from limpq_ext.app.stages import read_record

    return read_record(path)


KINDS = [
    Kind("indicators.json", again(Indicators.load), JSON),
    Kind("interactions.json", again(Interactions.load), JSON),
    Kind("costs.json", use_costs, JSON),
    Kind("policy.json", again(Policy.load), JSON),
    Kind("curve.json", again(Curve.load), JSON),
    Kind("latency.json", again(LatencyTable.load), JSON),
    Kind("latency.csv", again(LatencyTable.load)),
    Kind("limpq.pkl", again(Indicators.from_limpq), (pickle.loads, pickle.dumps)),
    Kind("limpq.pth.tar", lambda path: Indicators.from_limpq_checkpoint(path, (4, 2)), TORCH),
    Kind(
        "legacy.pth.tar",
        lambda path: Indicators.from_limpq_checkpoint(path, (4, 2)),
        (load_torch, save_legacy),
    ),
    Kind("limpq.yaml", lambda path: Policy.from_limpq(path, ["a", "b"]), YAML),
    Kind("trainer.pt", Indicators.from_checkpoint, TORCH),
    Kind("resume.checkpoint", resume, (load_torch, save_checkpoint)),
    Kind("weights.pt", lambda path: load_weights(make_network(), path), TORCH),
    Kind(
        "weights.safetensors",
        lambda path: load_weights(make_network(), path),
        (load_tensors, save_tensors),
    ),
    Kind(
        "packed.safetensors",
        lambda path: unpack(path, make_network()),
        (load_packed, save_packed),
    ),
    Kind("recipe.yaml", load_recipe, YAML),
    Kind("restrictions.yaml", load_restrictions, YAML),
    Kind("stages.json", read_stages, JSON),
    Kind("metrics.jsonl", lambda path: MetricsFile(path).start("a", after_step=1)),
]


# ---------------------------------------------------------------------------------------- breaking

WORDS = [
    b"1e999", b"-1", b"0", b"1e-320", b"NaN", b"Infinity", b"-Infinity", b"null", b"true",
    b'""', b"[]",
    b"{}", b"9" * 400, b"9" * 5000, b"1000000000000", b"9223372036854775808", b"[" * 100_000,
    b'{"a":' * 5000, b'"\\ud800"', b'"\\u001b[31m"', b"!!bool x", b"!!timestamp x", b"!!int x",
    b"!!float x", b"!!binary x", b"!!set x", b"!!python/object:os.system x", b"&a [*a]", b"*a",
    b"<<: 3", b"{? a : b, ? a : c}", b"[[a]: b]", b"0x" + b"f" * 5000, b"1:" * 5000 + b"1",
    b"2001-99-99", b"\xff\xfe", b"\x00", b"\n---\n", b"- " * 2000, b",,,", b'"', b"\xe2\x80\xa8",
]  # fmt: skip
"""What is put in the place of a word of a text."""


def odd_values(rng: random.Random) -> Any:
    """A value that has no business where it is put."""
    deep: Any = 0
    for _ in range(rng.choice((70, 3000))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice(
        [
            None, True, False, -1, 0, 1, 17, 2**31, 2**63, 10**12, 10**400, 10**5000, 0.5,
            -0.0, 1e308,
            5e-324, math.nan, math.inf, "", "x", "2", "\x1b[31m", "\ud800", "a\nb",
            "x" * 70_000, [], {},
            [[]], [1, 2], {"a": 1}, {"2": 0.5}, list(range(70_000)),
            {str(i): i for i in range(9000)}, deep,
        ]
    )  # fmt: skip


def odd_tensors(rng: random.Random) -> Any:
    """The same among tensors."""
    return rng.choice(
        [
            torch.zeros(()), torch.zeros(0), torch.zeros(3), torch.ones(1).expand(10**12),
            torch.ones(2, 1).expand(2, 10**12), torch.eye(3).to_sparse(), torch.zeros(2,
            device="meta"),
            torch.zeros(2, dtype=torch.complex64), torch.full((2,), math.nan),
            torch.zeros(2).long(),
            torch.zeros(2).bool(), torch.zeros(2, 2)[:, 0], nn.Parameter(torch.ones(2)),
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.float32, {1,
            2}, (1, (2,)),
            b"bytes", bytearray(b"bytes"), 1j, Counter("aab"), torch.Size((3,)),
            torch.device("cpu"),
            torch.ones(2, dtype=torch.float8_e5m2), torch.tensor([1.0, 2.0]).bfloat16(),
            {None: 1, 3: 2},
        ]
    )  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) in a value."""
    found, left = [], [value]
    while left:
        container = left.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                left.append(container[key])
    return found


def change_value(value: Any, rng: random.Random, tensors: bool) -> Any:
    """Change one place: put, delete, rename, move or copy something."""

    def odd() -> Any:
        return odd_tensors(rng) if tensors and rng.random() < 0.6 else odd_values(rng)

    spots = places(value) if isinstance(value, dict | list) else []
    if not spots or rng.random() < 0.03:
        return odd()
    container, key = rng.choice(spots)
    action = rng.choice(["put", "put", "put", "delete", "rename", "copy", "wrap", "self"])
    if action == "put":
        container[key] = odd()
    elif action == "delete":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        name = rng.choice(["x", "", "\x1b[31m", 3, None, -1, "0", "x" * 70_000, (1, 2)])
        container[name] = container.pop(key)
    elif action == "copy":
        other, where = rng.choice(spots)
        container[key] = (
            copy.copy(other[where]) if where in other or not isinstance(other, dict) else 0
        )
    elif action == "wrap":
        container[key] = [container[key]]
    elif action == "self":
        container[key] = value
    return value


def change_text(data: bytes, rng: random.Random) -> bytes:
    """Put something in the place of a word or a number."""
    words = list(re.finditer(rb'"[^"]*"|[\w.+-]+', data))
    if not words:
        return data
    word = rng.choice(words)
    return data[: word.start()] + rng.choice(WORDS) + data[word.end() :]


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, remove, repeat or overwrite bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        size = len(changed)
        at = rng.randrange(size + 1)
        end = min(size, at + rng.choice((1, 2, 4, 8, 100)))
        action = rng.randrange(7)
        if action == 0 and at < size:
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del changed[at:]
        elif action == 2:
            changed[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
        elif action == 3:
            del changed[at:end]
        elif action == 4:
            changed[at:at] = changed[at:end] * rng.choice((1, 2, 50))
        elif action == 5:
            changed[at:end] = rng.randbytes(end - at)
        elif action == 6:
            number = rng.choice((0, -1, 2**31 - 1, 2**30, 2**40, 2**62))
            changed[at : at + 8] = struct.pack("<q", number)
    return bytes(changed)


def broken(kind: Kind, data: bytes, rng: random.Random) -> bytes:
    """A broken file of this kind."""
    for _ in range(20):
        way = rng.random()
        try:
            if kind.form is not None and way < 0.6:
                load, save = kind.form
                tensors = load in (load_torch, load_tensors)
                return save(change_value(load(data), rng, tensors))
            if kind.name.endswith((".json", ".jsonl", ".yaml", ".csv")) and way < 0.85:
                return change_text(data, rng)
            return change_bytes(data, rng)
        except Exception:  # such a file cannot be written: another try
            continue
    return b""


# ----------------------------------------------------------------------------------------- hostile


class Called:
    """What is pickled as a call of a function with some arguments."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def bomb_of_tuples() -> bytes:
    """A pickle of a dict whose key is a tuple of a tuple of ..., each of them twice."""
    put, get = b"q\x00", b"h\x00"
    return b"\x80\x02}(K\x01" + (put + get + b"\x86") * 60 + b"K\x01u."


def bomb_of_lists() -> bytes:
    value: Any = []
    for _ in range(50):
        value = [value, value]
    return pickle.dumps({"weight": {}, "act": {}, "layer_name": [value]})


def bomb_of_states() -> bytes:
    value: Any = {}
    for _ in range(50):
        value = {"a": value, "b": value}
    return save_torch(value)


def rezipped(change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> bytes:
    """A state_dict's archive, written anew record by record."""
    file = io.BytesIO()
    valid = io.BytesIO(save_torch({"a": torch.zeros(10**6)}))
    with zipfile.ZipFile(valid) as source, zipfile.ZipFile(file, "w") as target:
        for record in source.infolist():
            change(target, record, source.read(record))
    return file.getvalue()


def deflate(target: zipfile.ZipFile, record: zipfile.ZipInfo, data: bytes) -> None:
    target.writestr(record.filename, data, zipfile.ZIP_DEFLATED)


def overlap(target: zipfile.ZipFile, record: zipfile.ZipInfo, data: bytes) -> None:
    target.writestr(record.filename, data)
    target.filelist += target.filelist[-1:] * 100


def with_step_sizes(step_sizes: Any) -> bytes:
    state = {"a.quan_w_fn.s": step_sizes, "a.quan_a_fn.s": step_sizes}
    return save_torch({"state_dict": state})


def costs_with(layer: Mapping[str, Any], tensors: Sequence[Mapping[str, Any]] = ()) -> bytes:
    one = {"name": "a", "kind": "linear", "macs": 1, "weights": 1, "activations": 1, **layer}
    costs = {"layers": [one], "fixed": [], "tensors": tensors}
    return write_json({"format": "limpq-costs", "version": 1, **costs})


def held(first: int, last: int) -> dict[str, Any]:
    return {"elements": 1, "layer": "a", "first": first, "last": last}


def with_shape(packed: bytes, rows: int, columns: int) -> bytes:
    """Another shape of the weights of a layer."""
    value = load_packed(packed)
    begin, _ = value["header"]["middle.weight_shape"]["data_offsets"]
    data = bytearray(value["data"])
    data[begin : begin + 16] = struct.pack("<qq", rows, columns)
    return save_packed({**value, "data": bytes(data)})


def checkpoint_with(**changes: Any) -> Callable[[Mapping[str, bytes]], bytes]:
    return lambda valid: save_checkpoint({**load_torch(valid["resume.checkpoint"]), **changes})


def many_fields() -> bytes:
    fields = [f'"{i}": 1' for i in range(60_000)] + ['"59999": 2']
    return f"{{{', '.join(fields)}}}".encode()


def bomb_of_aliases() -> bytes:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    return "\n".join(lines).encode()


HOSTILE: dict[str, tuple[str, Callable[[Mapping[str, bytes]], bytes], str]] = {
    "memo": ("limpq.pkl", lambda _: b"\x80\x02Nr\xff\xff\xff\x3f.", "puts a value in place 1073"),
    "bytearray": (
        "limpq.pkl",
        lambda _: b"\x80\x05\x96" + b"\xff" * 5 + b"\0\0\0.",
        "expected 1099",
    ),
    "tuples": ("limpq.pkl", lambda _: bomb_of_tuples(), "unfolds to more than"),
    "lists": ("limpq.pkl", lambda _: bomb_of_lists(), "unfolds to more than"),
    "deep": (
        "limpq.pkl",
        lambda _: b"(" * 9 + b"]" + b"\x85" * 10**5 + b".",
        "nested more than 64",
    ),
    "call": ("limpq.pkl", lambda _: pickle.dumps(Called(print, "x")), "asks for builtins.print"),
    "states": ("trainer.pt", lambda _: bomb_of_states(), "unfolds to more than"),
    "sized": (
        "trainer.pt",
        lambda _: save_torch(Called(bytearray, 10**11)),
        "__builtin__.bytearray",
    ),
    "tensor": (
        "weights.pt",
        lambda _: save_torch(Called(torch.Tensor, 10**11)),
        "it asks for torch.Tensor",
    ),
    "deflated": ("weights.pt", lambda _: rezipped(deflate), "its records are compressed"),
    "overlapping": ("weights.pt", lambda _: rezipped(overlap), "its records overlap"),
    "expanded": (
        "limpq.pth.tar",
        lambda _: with_step_sizes(torch.ones(1).expand(10**12)),
        "shows 1000000000000 elements of a storage of 4 bytes",
    ),
    "sparse": ("limpq.pth.tar", lambda _: with_step_sizes(torch.ones(2).to_sparse()), "is sparse"),
    "meta": (
        "limpq.pth.tar",
        lambda _: with_step_sizes(torch.ones(2, device="meta")),
        "is on the device 'meta'",
    ),
    "complex": ("limpq.pth.tar", lambda _: with_step_sizes(torch.ones(2) + 1j), "is complex"),
    "integers": ("limpq.pth.tar", lambda _: with_step_sizes(torch.arange(2)), "is torch.int64"),
    "keys": ("limpq.pth.tar", lambda _: save_torch({"state_dict": {3: 1}}), "has the key 3"),
    "none": ("weights.pt", lambda _: save_torch({None: torch.ones(1)}), "holds no state_dict"),
    "steps": (
        "resume.checkpoint",
        checkpoint_with(step=10**9),
        "step: is 1000000000, expected 0 to",
    ),
    "no steps": ("resume.checkpoint", checkpoint_with(step="3"), "step: is '3', expected 0 to"),
    "processes": ("resume.checkpoint", checkpoint_with(processes={}), "processes: is no list"),
    "brackets": ("policy.json", lambda _: b"[" * 10**6, "is nested too deeply"),
    "nested": (
        "policy.json",
        lambda _: b'{"a":' * 80 + b"1" + b"}" * 80,
        "nested more than 64 deep",
    ),
    "fields": ("policy.json", lambda _: many_fields(), "field '59999' stands twice"),
    "digits": (
        "costs.json",
        lambda _: costs_with({"macs": 10**400}),
        "an integer of 401 digits",
    ),
    "large": (
        "costs.json",
        lambda _: costs_with({"macs": 10**50}),
        "macs is an integer of 167 bits",
    ),
    "moments": (
        "costs.json",
        lambda _: costs_with({}, [held(0, 10**12)]),
        "last is 1000000000000, expected below 100000",
    ),
    "held": ("costs.json", lambda _: costs_with({}, [held(0, 99_999)] * 200), "held at 20000000"),
    "list": ("stages.json", lambda _: b"[]", "holds [], not a JSON object"),
    "null": ("stages.json", lambda _: b"null", "holds None, not a JSON object"),
    "stage": (
        "stages.json",
        lambda files: files["stages.json"].replace(b'"profile": {', b'"profile": ['),
        "not JSON",
    ),
    "shape": (
        "packed.safetensors",
        lambda files: with_shape(files["packed.safetensors"], 10**6, 10**6),
        "for 3 bits of a weight of shape (1000000, 1000000, 3, 3)",
    ),
    "header": (
        "packed.safetensors",
        lambda files: struct.pack("<Q", 2**40) + files["packed.safetensors"][8:],
        "its header has 1099511627776 bytes",
    ),
    "aliases": ("recipe.yaml", lambda _: bomb_of_aliases(), "more than 100000 values"),
    "itself": ("recipe.yaml", lambda _: b"model: &a [*a]", "a value that holds itself"),
    "flow": ("recipe.yaml", lambda _: b"model: " + b"[" * 10**5, "nested more than 64 deep"),
    "bool": ("recipe.yaml", lambda _: b"seed: !!bool x", "not of the type that its tag says"),
    "time": ("recipe.yaml", lambda _: b"seed: !!timestamp x", "not of the type that its tag says"),
    "sixty": ("recipe.yaml", lambda _: b"seed: 1" + b":1" * 400_000, "more than 10000 characters"),
    "twice": ("restrictions.yaml", lambda _: b"tied: []\ntied: [a]", "key 'tied' stands twice"),
    "width": ("recipe.yaml", lambda _: b"bits: [" + b"9" * 4000 + b"]", "bits"),
    "too large": ("recipe.yaml", lambda _: b"#" * 2**21, "larger than a recipe file may be, 1 MiB"),
    "configuration": ("limpq.yaml", lambda _: bomb_of_aliases(), "more than 100000 values"),
    "cell": ("latency.csv", lambda _: b'"' + b"x" * 10**6 + b'"', "field larger than field limit"),
}
"""Name: the kind of file, what makes it out of the valid files, and a part of the error."""


# ----------------------------------------------------------------------------------------- reading


@contextmanager
def limited_time():
    """Raise OutOfTimeError after some seconds of the processor's time."""

    def out_of_time(number, frame):
        raise OutOfTimeError

    before = signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def problem_of(kind: Kind, path: Path, reason: str | None = None) -> str:
    """What is wrong with how reading ended; nothing, if it ended well.

    With a reason it has to be an error that says it.
    """
    try:
        with limited_time():
            kind.read(path)
    except FileFormatError as error:
        if not str(error).startswith(f"{path}: "):
            return f"does not begin with the file's name: {str(error)[:300]}"
        if not str(error).isprintable():
            return f"is not printable: {error!r:.300}"
        if reason is not None and reason not in str(error):
            return f"does not say {reason!r}: {str(error)[:300]}"
        return ""
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return f"{type(error).__name__} in {where}: {error!s:.200}"
    return "" if reason is None else "is no error"


def limit_memory() -> None:
    """From here on the process gets MEGABYTES more at most."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--hostile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    valid = write_files(options.folder)
    for kind in KINDS:  # what is imported at the first use is no part of the limit
        kind.read(options.folder / kind.name)
    kinds = {kind.name: kind for kind in KINDS}
    hostile = (
        {name: make(valid) for name, (_, make, _) in HOSTILE.items()} if options.hostile else {}
    )
    limit_memory()
    for name, data in hostile.items():
        kind_name, _, reason = HOSTILE[name]
        print(json.dumps({"hostile": name}), flush=True)
        path = options.folder / kind_name
        path.write_bytes(data)
        problem = problem_of(kinds[kind_name], path, reason)
        if problem:
            print(json.dumps({"hostile": name, "problem": problem}), flush=True)
    tried: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for number in range(options.seed, options.seed + options.count):
        kind = KINDS[number % len(KINDS)]
        data = broken(kind, valid[kind.name], random.Random(number))
        path = options.folder / kind.name
        path.write_bytes(data)
        print(json.dumps({"seed": number, "kind": kind.name}), flush=True)
        problem = problem_of(kind, path)
        tried[kind.name] += 1
        if problem:
            wrong[kind.name] += 1
            print(json.dumps({"seed": number, "kind": kind.name, "problem": problem}), flush=True)
    print(json.dumps({"tried": dict(tried), "wrong": dict(wrong)}))


if __name__ == "__main__":
    main()
