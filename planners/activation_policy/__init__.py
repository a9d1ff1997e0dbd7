"""Which tokens of which layer's activations are kept on the device, swapped to the host, or made again in backward.

``memo_alpha`` is MEMO's closed form, ``choose`` the program that goes past it, ``replay`` the clock of both.
"""

from .memo import MemoAlpha as MemoAlpha
from .memo import memo_alpha as memo_alpha
from .problem import ActivationTask as ActivationTask
from .problem import Policy as Policy
from .problem import TensorGroup as TensorGroup
from .program import Choice as Choice
from .program import choose as choose
from .replay import Replay as Replay
from .replay import replay as replay

__all__ = [
    "ActivationTask",
    "Choice",
    "MemoAlpha",
    "Policy",
    "Replay",
    "TensorGroup",
    "choose",
    "memo_alpha",
    "replay",
]
