"""What a module is to a parallel layout, said by the model and read by ``tensor.py``.

A model that names the roles of its modules can be sharded without knowing how; so can a user's own model.
"""

from enum import StrEnum


class Role(StrEnum):
    """The part a module plays in a transformer with a sequence-sharded residual stream."""

    EMBEDDING = "embedding"
    """token ids to features"""
    NORM = "norm"
    """acts on each token by itself, on the local tokens; its weight is replicated"""
    BRANCH = "branch"
    """attention or MLP: reads the whole sequence of its local tokens' norm, so that one gather serves all matrices"""
    COLUMN = "column"
    """a matrix split by output features"""
    ROW = "row"
    """a matrix split by input features, whose partial results are summed and scattered over the tokens"""
    HEAD = "head"
    """the projection onto the vocabulary, split by its rows"""
