"""``distrain launch``: torchrun's flags, and what torchrun lacks; the work is in distrain.launch."""

from distrain.launch.reading import parse
from distrain.launch.run import run


def launch(argv: list[str]) -> int:
    """Run the job that ``argv`` asks for; its exit code. Raises DistrainError, and SystemExit on wrong usage."""
    return run(parse(argv))
