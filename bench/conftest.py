"""Options of the kernel benchmarks, and the table at their end."""

from __future__ import annotations

import pytest
import torch

from bench import report, timing
from bench.cases import all_cases

RESULTS = pytest.StashKey[list[report.Result]]()
OTHERS = pytest.StashKey[timing.OtherProcesses]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("limpq_ext benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--quick", action="store_true", help="fewer cases and rounds, no torch.compile")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    config.stash[OTHERS] = timing.OtherProcesses()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        cases = all_cases(config.getoption("device"), quick=config.getoption("quick"))
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    chosen = pytestconfig.getoption("device")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if chosen == "cpu":
        timing.keep_freed_memory()
    return chosen


@pytest.fixture
def results(pytestconfig: pytest.Config) -> list[report.Result]:
    return pytestconfig.stash[RESULTS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.stash[RESULTS]:
        terminalreporter.write_line("")
        terminalreporter.write_line(report.table(config.stash[RESULTS]))
        warning = report.contention(config.stash[OTHERS].share())
        if warning:
            terminalreporter.write_line(f"Careful: {warning}.", yellow=True)
