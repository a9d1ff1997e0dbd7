"""Sequence parallelism: Ulysses, ring attention and both, over packed sequences of any lengths."""
