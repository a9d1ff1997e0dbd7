"""What a memory plan needs of one rank's layer, measured by tracing it."""

import torch

from distrain.core.vocabulary import ModelShape
from distrain.planners.memory_request import LayerFacts

from .rank_layers import Kind, rank_layer
from .trace import Trace, TracedTensor, trace_module


def layer_facts(shape: ModelShape, *, kind: Kind, tp: int, cp: int, seq_len: int) -> LayerFacts:
    """Trace a layer of ``shape`` on one of ``tp * cp`` ranks that share a sequence of ``seq_len`` tokens."""
    rows = seq_len // (tp * cp)
    hidden = torch.empty(1, rows, shape.d_model, dtype=torch.bfloat16, device="meta")
    found = trace_module(rank_layer(shape, kind=kind, tp=tp, cp=cp), hidden)
    left = max(each.birth for each in found.gradients)
    return LayerFacts(
        num_tokens=rows,
        hidden_bytes=hidden.nbytes,
        group_bytes=_groups(found),
        forward=found.transients(backward=False),
        forward_ticks=found.forward_end,
        backward=found.transients(backward=True),
        backward_ticks=found.end - found.forward_end,
        gradient_birth=left - found.forward_end - 1,
    )


def _groups(found: Trace) -> dict[str, int]:
    """Bytes of the skeletal tensors by fate: attention is never made again, and parts what is before it and after."""
    attends = next(each.birth for each in found.tensors if "attention" in each.op)
    groups = {"input": 0, "attention": 0, "before_attention": 0, "after_attention": 0}
    inputs = set(found.inputs)
    for each in found.skeletal:
        groups[_group(each, attends, is_input=each in inputs)] += each.num_bytes
    return groups


def _group(tensor: TracedTensor, attends: int, *, is_input: bool) -> str:
    if is_input:
        return "input"
    if tensor.birth == attends:
        return "attention"
    return "before_attention" if tensor.birth < attends else "after_attention"
