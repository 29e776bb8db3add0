"""Settings of all tests."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that records what docs/compatibility.md is made from."""
    parser.addoption("--compatibility", metavar="FILE", help="write what was shown of each method")


def pytest_configure(config: pytest.Config) -> None:
    """Record, if that was asked for."""
    if file := config.getoption("--compatibility"):
        from compatibility import Recorder

        config.pluginmanager.register(Recorder(Path(file)))
