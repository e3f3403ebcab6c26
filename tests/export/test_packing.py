"""Codes of few bits in words, as compressed-tensors lays them out."""

import importlib.util
import itertools
import subprocess
import sys
from importlib import metadata

import deployed
import pytest
import torch

import limpq_ext as lq
from limpq_ext.export.codes import layer_codes
from limpq_ext.export.packing import pack_codes, unpack_codes
from limpq_ext.values.packed_files import best_packed_dim, matrix_shape, words_shape

SHAPES = [
    (1, 1), (3, 7), (5, 32), (2, 33), (31, 4), (64, 65), (6, 3, 3), (4, 2, 3, 3), (2, 3, 2, 2, 2),
]  # fmt: skip


def codes(shape, bits):
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("packed_dim", [0, 1])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back(shape, bits, packed_dim):
    values = codes(shape, bits)
    words = pack_codes(values, bits, packed_dim)
    assert words.dtype == torch.int32
    assert words.shape == words_shape(shape, bits, packed_dim)
    assert torch.equal(unpack_codes(words, bits, shape, packed_dim), values)


@pytest.mark.parametrize(
    ("bits", "row", "words"),
    [
        # Each code plus 2^(bits - 1), the first in the lowest bits.
        (2, [-2, -1, 0, 1], [0b11_10_01_00]),
        (4, [-8, -7, 0, 7, -8, -8, -8, 7], [0xF000F810 - 2**32]),
        # Code 10 has two bits in the first word, one in the second.
        (3, [-4] * 10 + [3], [(0b11 << 30) - 2**32, 0b1]),
        (3, [-4] * 10 + [1], [(0b01 << 30), 0b1]),
        # Code 6 begins at bit 30.
        (5, [-16] * 6 + [-16 + 0b10111], [(0b11 << 30) - 2**32, 0b101]),
        (8, [-128, -127, 0, 127, -126], [0xFF800100 - 2**32, 2]),
        (7, [63, -64, -64, -64, -64 + 0b1010101], [(0b0101 << 28) | 127, 0b101]),
        (6, [-32] * 5 + [-32 + 0b110110], [(0b10 << 30) - 2**32, 0b1101]),
    ],
)
def test_words_are_those_computed_by_hand(bits, row, words):
    values = torch.tensor([row], dtype=torch.int8)
    expected = torch.tensor([words], dtype=torch.int32)
    assert torch.equal(pack_codes(values, bits, 1), expected)
    assert torch.equal(pack_codes(values.T, bits, 0), expected.T)
    assert torch.equal(unpack_codes(expected, bits, (1, len(row)), 1), values)


def compressed_tensors():
    """Its own packing, loaded by itself: the package asks for transformers, which that does not."""
    try:
        installed = metadata.distribution("compressed-tensors")
    except metadata.PackageNotFoundError:
        pytest.skip("compressed-tensors, whose layout this is, is not installed")
    path = installed.locate_file("compressed_tensors/compressors/pack_quantized/helpers.py")
    spec = importlib.util.spec_from_file_location("compressed_tensors_packing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_those_of_compressed_tensors(bits):
    theirs = compressed_tensors()
    for shape, packed_dim in itertools.product(SHAPES, (0, 1)):
        matrix = codes(shape, bits).reshape(matrix_shape(shape))
        words = pack_codes(matrix, bits, packed_dim)
        assert torch.equal(words, theirs.pack_to_int32(matrix, bits, packed_dim))
        if packed_dim == 1 or len(words) > 1:  # its 4 bits do not unpack a single word downwards
            back = theirs.unpack_from_int32(words, bits, matrix.shape, packed_dim)
            assert torch.equal(back, matrix)


@pytest.mark.parametrize(
    ("shape", "bits", "packed_dim", "words"),
    [
        ((32, 1, 3, 3), 3, 0, (3, 9)),  # depthwise: a row of 9 codes would take a word
        ((64, 64, 3, 3), 4, 1, (64, 72)),
        ((8, 8), 4, 1, (8, 1)),  # both take as many
        ((7, 64), 5, 1, (7, 10)),
    ],
)
def test_words_run_along_the_axis_that_takes_fewer(shape, bits, packed_dim, words):
    assert best_packed_dim(shape, bits) == packed_dim
    assert words_shape(shape, bits, packed_dim) == words


def test_words_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"have shape \(2, 2\), expected \(2, 1\) for 3 bits"):
        unpack_codes(torch.zeros(2, 2, dtype=torch.int32), 3, (2, 10), 1)


def test_compressed_tensors_reads_the_file_by_itself(tmp_path):
    """Codes and scales of a file, in an environment without this package."""
    theirs = compressed_tensors()
    model, _ = deployed.quantized("depthwise")
    lq.save(model, tmp_path / "a.safetensors")
    script = """
import importlib.util, json, sys
sys.modules["limpq_ext"] = None
import torch
from safetensors import safe_open
spec = importlib.util.spec_from_file_location("theirs", sys.argv[1])
theirs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs)
with safe_open("a.safetensors", "pt") as file:
    layers = json.loads(next(iter(file.metadata().values())))["layers"]
    found = {}
    for name, own in layers.items():
        words, shape, scale = (
            file.get_tensor(f"{name}.weight_{what}") for what in ("packed", "shape", "scale")
        )
        shape = shape.tolist()
        matrix = torch.Size([shape[0], torch.Size(shape[1:]).numel()])
        weight = own["weight"]
        codes = theirs.unpack_from_int32(words, weight["bits"], matrix, weight.get("packed_dim", 1))
        found[name] = codes.reshape(shape)
torch.save(found, "codes.pt")
"""
    command = [sys.executable, "-c", script, theirs.__file__]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "codes.pt", weights_only=True)
    expected = layer_codes(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(codes, expected[name].weights) for name, codes in found.items())
