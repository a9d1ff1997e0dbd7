"""Faults: injected on purpose (``inject``) and simulated at scale (``simulate``)."""

if not __name__.startswith("distrain."):
    raise ImportError(f"{__name__} is a part of distrain: import distrain.{__name__} instead")
