"""Traces: exact lifetimes, skeletal and transient tensors, MEMO's count, and nothing of the module is touched."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distrain.activation import Trace, trace_module
from distrain.activation.rank_layers import Kind, rank_layer
from distrain.activation.snapshot import from_events, read_snapshot
from distrain.core.errors import ConfigError
from distrain.core.vocabulary import PRESETS
from distrain.planners.buffers import solve, table, violations

MILLION = 1 << 20
GPT_7B = replace(PRESETS["7b"], d_ffn=4 * PRESETS["7b"].d_model)


def layer_trace(kind: Kind, *, tp: int = 1, cp: int = 1, tokens: int = MILLION) -> tuple[Trace, int]:
    """The trace of a 7B layer, and the bytes of one rank's hidden state."""
    shape = GPT_7B if kind == "gpt" else PRESETS["7b"]
    hidden = torch.empty(1, tokens // (tp * cp), shape.d_model, dtype=torch.bfloat16, device="meta")
    return trace_module(rank_layer(shape, kind=kind, tp=tp, cp=cp), hidden), hidden.nbytes


def test_memos_layer_keeps_16_units_at_a_million_tokens() -> None:
    found, unit = layer_trace("gpt")
    assert found.skeletal_bytes / unit == pytest.approx(16.0, abs=0.02)
    by_op = {each.op.partition(".")[0]: each.num_bytes / unit for each in found.skeletal}
    assert (by_op["input"], by_op["gelu"]) == (1, 4)
    assert sum(each.num_bytes for each in found.skeletal if "attention" in each.op) / unit == pytest.approx(
        1, abs=0.02
    )


@pytest.mark.parametrize("tp", [2, 8])
def test_tensor_parallel_ranks_keep_their_share(tp: int) -> None:
    found, unit = layer_trace("gpt", tp=tp)
    assert found.skeletal_bytes / unit == pytest.approx(16.0, abs=0.02)


def test_a_llama_layer_keeps_what_its_formula_says() -> None:
    found, unit = layer_trace("llama")
    shape = PRESETS["7b"]
    expected = 6 + 2 * shape.num_kv_heads / shape.num_heads + 4 * shape.d_ffn / shape.d_model
    assert found.skeletal_bytes / unit == pytest.approx(expected, abs=0.02)


def test_an_exchange_over_cp_keeps_attention_on_both_of_its_sides() -> None:
    found, unit = layer_trace("gpt", cp=4)
    assert found.skeletal_bytes / unit == pytest.approx(17.0, abs=0.02)


def test_heads_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        rank_layer(PRESETS["tiny"], kind="llama", tp=4, cp=1)
    assert "tp x cp does not divide model.num_kv_heads" in str(caught.value)


class Chain(nn.Module):
    """x -> a = x @ w (dies) -> b = relu(a) (kept) -> c = b @ w (returned)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))  # type: ignore[no-any-return]


def test_lifetimes_are_exact() -> None:
    found = trace_module(Chain(), torch.empty(4, 8))
    made = {each.op.partition(".")[0]: each for each in found.tensors if each.birth <= found.forward_end}
    assert set(made) == {"mm", "relu"}
    assert [each.op for each in found.outputs] == ["mm.default"]
    assert [each.op for each in found.skeletal] == ["input", "relu.default"]
    assert found.skeletal_bytes == 2 * 4 * 8 * 4
    (product,) = found.transients(backward=False)
    assert (product.size, product.upper > product.lower) == (128, True)
    relu = made["relu"]
    readers = [each for each in found.tensors if relu.birth < each.birth < relu.death]
    assert any(each.op.startswith("threshold_backward") for each in readers)
    assert all(each.birth < each.death <= found.end + 1 for each in found.tensors)


def test_the_module_is_as_it_was() -> None:
    module = Chain()
    before = {name: (id(each), each.clone()) for name, each in module.named_parameters()}
    trace_module(module, torch.empty(4, 8))
    for name, each in module.named_parameters():
        assert id(each) == before[name][0]
        assert torch.equal(each, before[name][1])
        assert each.grad is None


def test_a_module_that_raises_is_as_it_was_too() -> None:
    module = Chain()
    weight = module.one.weight
    with pytest.raises(RuntimeError):
        trace_module(module, torch.empty(4, 9))
    assert module.one.weight is weight


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Chain() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
        return x


def test_checkpointing_shows_in_the_trace() -> None:
    plain = trace_module(nn.Sequential(*(Chain() for _ in range(3))), torch.empty(4, 8))
    found = trace_module(Checkpointed(), torch.empty(4, 8))
    assert plain.skeletal_bytes == 6 * 128
    assert found.skeletal_bytes == 3 * 128
    assert found.end > plain.end


def test_a_loss_ends_the_forward_pass() -> None:
    found = trace_module(Chain(), torch.empty(4, 8), loss=lambda y: y.square().mean(), requires_grad=False)
    assert any(each.op.startswith("mean") for each in found.tensors)
    assert not [each for each in found.gradients if each.birth > found.forward_end + 1]


def test_a_trace_goes_through_csv_and_is_planned(tmp_path: Path) -> None:
    found, _ = layer_trace("gpt")
    table.write(tmp_path / "trace.csv", found.buffers())
    buffers = table.read(tmp_path / "trace.csv")
    assert buffers == found.buffers()
    plan = solve(buffers)
    assert plan.gap == 0
    assert plan.peak is not None
    assert not violations(buffers, plan.offsets, peak=plan.peak)


EVENTS = [
    {"action": "free_requested", "addr": 1, "size": 5},
    {"action": "alloc", "addr": 64, "size": 512},
    {"action": "segment_alloc", "addr": 0, "size": 4096},
    {"action": "alloc", "addr": 1024, "size": 100},
    {"action": "free_requested", "addr": 64, "size": 512},
    {"action": "free_completed", "addr": 64, "size": 512},
    {"action": "alloc", "addr": 64, "size": 7},
]


def test_a_cuda_snapshot_becomes_buffers(tmp_path: Path) -> None:
    path = tmp_path / "snapshot.json"
    path.write_text(json.dumps({"segments": [], "device_traces": [[], EVENTS]}))
    found = read_snapshot(path, device=1)
    assert [(each.lower, each.upper, each.size) for each in found.buffers] == [
        (1, 4, 512),
        (3, 7, 100),
        (6, 7, 7),
    ]
    assert (found.num_older, found.num_younger) == (1, 2)
    with pytest.raises(ConfigError, match="no such device"):
        read_snapshot(path, device=2)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_snapshot(path)


def test_events_that_cannot_be_true_are_all_listed() -> None:
    twice = [{"action": "alloc", "addr": 8, "size": 1}] * 2
    with pytest.raises(ConfigError) as caught:
        from_events([*twice, {"action": "alloc", "addr": "x", "size": 1}])
    assert len(caught.value.problems) == 2
