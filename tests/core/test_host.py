"""Memory of host and process, read from the kernel."""

import os

from distrain.core.host import host_memory_bytes, peak_resident_bytes, reset_peak_resident, resident_bytes

MIB = 1024**2


def test_the_host_has_at_most_its_physical_memory() -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 64 * MIB < host_memory_bytes() <= physical


def test_the_peak_follows_an_allocation_and_survives_its_release_until_it_is_reset() -> None:
    reset_peak_resident()
    before = peak_resident_bytes()
    block = bytearray(b"x") * (128 * MIB)
    assert resident_bytes() >= 128 * MIB
    assert peak_resident_bytes() >= before + 100 * MIB
    del block
    high = peak_resident_bytes()
    assert high >= before + 100 * MIB
    if reset_peak_resident():
        assert peak_resident_bytes() <= high - 64 * MIB
    else:
        assert peak_resident_bytes() >= high
