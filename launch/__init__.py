"""Start, place and stop the processes of a job: a drop-in for torchrun that can also emulate nodes."""

if not __name__.startswith("distrain."):
    raise ImportError(f"{__name__} is a part of distrain: import distrain.{__name__} instead")
