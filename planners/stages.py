"""Which layers a pipeline stage holds, and how many parameters that makes.

Layers are shared out as evenly as they go. Stages at the ends have the embedding or the output head on top,
so a layer left over goes to a stage in the middle: from the back, where 1F1B keeps the fewest activations.
"""

from collections.abc import Sequence

from distrain.core.errors import ConfigError
from distrain.core.vocabulary import ModelShape

LayerRange = tuple[int, int]
"""half-open range of layers"""


def stage_layers(num_layers: int, num_stages: int) -> tuple[LayerRange, ...]:
    """The layers of each stage; ConfigError if a stage would have none."""
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(
            "every pipeline stage needs a layer",
            got=f"{num_stages} stages, {num_layers} layers",
            allowed=f"1 to {num_layers} stages" if num_layers > 0 else "at least one layer",
        )
    each, left_over = divmod(num_layers, num_stages)
    order = [*range(num_stages - 2, -1, -1), num_stages - 1]
    longer = set(order[:left_over])
    ranges = []
    first = 0
    for stage in range(num_stages):
        last = first + each + (stage in longer)
        ranges.append((first, last))
        first = last
    return tuple(ranges)


def stage_params(shape: ModelShape, layers: Sequence[LayerRange]) -> tuple[int, ...]:
    """Parameters of each stage: its layers, the embedding on the first, final norm and head on the last."""
    table = shape.vocab_size * shape.d_model
    counts = [(last - first) * shape.layer_params for first, last in layers]
    counts[0] += table
    counts[-1] += table + shape.d_model
    return tuple(counts)
