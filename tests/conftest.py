"""Devices: tests that need CUDA are collected everywhere and skipped, with the reason.

The command line, as tests of several modules run it.
"""

import signal
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def skip_without_cuda(request):
    """Skips tests marked `cuda` where they cannot run."""
    if request.node.get_closest_marker("cuda") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    from limpq_ext.kernels.ops import build_info

    if "cuda version" not in build_info():
        pytest.skip("this build of limpq_ext has no CUDA kernels")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Each device in turn; tensors and modules that the test makes are on it."""
    same_every_time = {"benchmark": False, "deterministic": True, "allow_tf32": False}
    with torch.device(request.param), torch.backends.cudnn.flags(**same_every_time):
        yield request.param


@pytest.fixture
def heeding_interrupts():
    """Python's own handler of Ctrl-C; a shell starts what runs in its background without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def limpq(monkeypatch, capsys, tmp_path):
    """Runs the command line in a folder of its own: exit code, standard output, errors."""
    from limpq_ext.app.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["limpq", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        told = capsys.readouterr()
        return code, told.out, told.err

    return run
