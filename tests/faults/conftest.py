"""A job of victims, of which nothing is left when the test is over."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.victims import Scene, left_groups


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """What still runs at the end is killed; control groups must be gone by then."""
    found = Scene(tmp_path)
    yield found
    for victim in found.victims:
        victim.end()
    assert left_groups(os.getpid()) == []
