"""``core.netns``: who does not get a network of its own is told so, and stays out of the one that there is."""

import errno
from pathlib import Path

import pytest

from distrain.core import netns


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize("is_user", [False, True])
def test_whatever_the_kernel_refuses_a_namespace_for_is_an_error(
    code: int, is_user: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers = iter([errno.EPERM, code] if is_user else [code])
    monkeypatch.setattr(netns, "_unshared", lambda flags: next(answers))
    monkeypatch.setattr(
        netns, "_TUN", str(tmp_path / "none")
    )  # whoever goes on must not get at the host's network
    with pytest.raises(OSError) as caught:
        netns.enter(0)
    assert (caught.value.filename, caught.value.errno) == ("namespace", code)
