"""Tensors out of files, and nothing that runs."""

import ast
from pathlib import Path

import pytest
import torch

import limpq_ext
from limpq_ext.values.reading import FileFormatError
from limpq_ext.values.tensor_files import load_saved


class Runs:
    """Writes a file where it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, zipped):
    path, ran = tmp_path / "state.pt", tmp_path / "ran"
    torch.save({"a": Runs(ran)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError, match=r"state\.pt: not a readable checkpoint: ") as caught:
        load_saved(path, "weights")
    assert "\n" not in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.eye(2).to_sparse(), "is sparse, nested or quantized"),
        (torch.zeros(2, device="meta"), "is on the device 'meta' and holds no values"),
        (torch.zeros(2, dtype=torch.complex64), "is complex, expected real numbers"),
        (torch.zeros(1).expand(2**20), "shows 1048576 elements of a storage of 4 bytes"),
    ],
)
def test_a_tensor_that_is_not_plain_is_named_by_its_place(tmp_path, value, reason):
    torch.save({"state": [value]}, tmp_path / "state.pt")
    with pytest.raises(FileFormatError, match=rf"state\.pt: tensor 'state\.0' {reason}"):
        load_saved(tmp_path / "state.pt", "weights")


def test_no_other_module_unpickles():
    found = set()
    folder = Path(limpq_ext.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = {f"{node.value.id}.{node.attr}"}
            else:
                continue
            if names & {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"}:
                found.add(path.relative_to(folder).as_posix())
    assert found == {"values/pickles.py", "values/tensor_files.py"}
