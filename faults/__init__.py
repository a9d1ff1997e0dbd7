"""Recording, detection and injection of faults. Nothing is built here yet: the room and its import rule stand."""

if not __name__.startswith("distrain."):
    raise ImportError(f"{__name__} is a part of distrain: import distrain.{__name__} instead")
