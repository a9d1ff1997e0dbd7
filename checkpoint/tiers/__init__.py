"""Where checkpoints are kept: one file a kind of medium, each a ``Storage``."""
