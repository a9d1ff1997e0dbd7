"""Numbers as people write them: 80GiB, 11GB/s, 1M tokens, 172TF."""

import re

from distrain.core.errors import Problem

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([A-Za-z/]*)\s*$")
_BYTES: dict[str, float] = {
    "": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
UNITS: dict[str, dict[str, float]] = {
    "bytes": _BYTES,
    "rate": {f"{name}/s" if name else "": size for name, size in _BYTES.items()},
    "tokens": {"": 1, "k": 2**10, "m": 2**20},
    "flops": {"": 1, "gf": 1e9, "tf": 1e12, "pf": 1e15, "tflops": 1e12, "tflop/s": 1e12},
}
_EXAMPLES = {
    "bytes": "80GiB, 2TiB, 64GB",
    "rate": "11GB/s, 50GiB/s",
    "tokens": "65536, 128K, 1M",
    "flops": "172TF",
}


def number(text: str, *, kind: str, flag: str, problems: list[Problem]) -> float:
    """``text`` as a number of ``kind``; 0, and one more of ``problems``, if it is none or below 1."""
    found = _NUMBER.match(text)
    unit = found.group(2).lower() if found else ""
    size = UNITS[kind].get(unit, 0.0)
    if found is None or float(found.group(1)) * size < 1:
        problems.append(Problem(f"{flag} cannot be read", got=text, allowed=_EXAMPLES[kind]))
        return 0.0
    return float(found.group(1)) * size
