"""Keepers whose sockets and processes are gone when the test is over."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.keepers import Keepers, keepers_in


@pytest.fixture
def keepers(tmp_path: Path) -> Iterator[Keepers]:
    """Starts clients and trainers of one job."""
    with keepers_in(tmp_path) as found:
        yield found
