"""Pure mathematics on dataclasses: schedules, layouts, memory. No torch, no processes."""

if not __name__.startswith("distrain."):
    raise ImportError(f"{__name__} is a part of distrain: import distrain.{__name__} instead")
