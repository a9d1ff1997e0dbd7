"""What holds for every test: repeatable examples, one thread, nothing left behind, counts by marker, GPUs if any."""

import sys

import pytest
from hypothesis import settings

from helpers.counts import MINIMUM, MarkerCounts

pytest_plugins = ["helpers.leaks"]


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("distrain", max_examples=50, derandomize=True, deadline=None)
    settings.load_profile("distrain")
    config.pluginmanager.register(MarkerCounts(config, MINIMUM), "marker-counts")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if loaded := sys.modules.get("torch"):
        loaded.set_num_threads(
            1
        )  # as ranks have: same sums, and no threads that spin while ranks wait for a core
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
