"""One process: losses, gradients and weights of managed layers are those of unmanaged ones, to the bit."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.activation.ledger import ActivationReport
from distrain.activation.manager import ActivationManager
from distrain.activation.segments import TokenSegments
from distrain.core.vocabulary import ModelShape
from distrain.planners.activation_plan import ActivationPlan, LayerPlan, Split, snap, uniform
from distrain.train.model import Block, Rotary

NUM_TOKENS, WIDTH = 1024, 32
ALPHAS = (0.0, 1 / 8, 0.3, 0.5, 0.77, 1.0)


class GptLayer(nn.Module):
    """LayerNorm, GELU, dropout after both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        out: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.proj(self.attend(self.norm1(x))))
        y: Tensor = self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        return x + y


def layers_of(kind: str, number: int = 3) -> nn.ModuleList:
    torch.manual_seed(1)
    if kind == "gpt":
        return nn.ModuleList([GptLayer() for _ in range(number)])
    shape = ModelShape(d_model=WIDTH, num_layers=number, num_heads=4, num_kv_heads=2, d_ffn=48, vocab_size=8)
    rotary = Rotary(shape)
    return nn.ModuleList([Block(shape, rotary) for _ in range(number)])


def sample(rows: int = 1, num_tokens: int = NUM_TOKENS) -> Tensor:
    return torch.randn(rows, num_tokens, WIDTH, generator=torch.Generator().manual_seed(2))


def gradients(layers: nn.ModuleList, x: Tensor, *, autocast: bool = False) -> list[Tensor]:
    """Loss, and gradients of the input and of all parameters."""
    torch.manual_seed(3)
    layers.zero_grad()
    x = x.clone().requires_grad_()
    y = x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for layer in layers:
            y = layer(y)
    loss = y.float().square().mean()
    loss.backward()
    return [loss.detach()] + [each.grad for each in (x, *layers.parameters()) if each.grad is not None]


def managed(
    layers: nn.ModuleList,
    x: Tensor,
    plan: ActivationPlan,
    *,
    autocast: bool = False,
    segments: str | TokenSegments = "auto",
) -> tuple[list[Tensor], ActivationReport]:
    with ActivationManager(layers, plan, segments=segments) as manager:
        found = gradients(layers, x, autocast=autocast)
    report = manager.report()
    assert report.host_bytes == 0
    return found, report


def everywhere(layer: LayerPlan, number: int = 3) -> ActivationPlan:
    return ActivationPlan(layers=(layer,) * number)


def mode_plan(mode: str, *, alpha: float = 1.0) -> ActivationPlan:
    """The mode for every layer, also the last two."""
    return everywhere(uniform(mode, num_layers=3, num_tokens=NUM_TOKENS, alpha=alpha).layers[0])


def assert_same(found: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    assert len(found) == len(truth)
    for left, right in zip(found, truth, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_no_alpha_and_no_mode_changes_a_bit(kind: str, rows: int, autocast: bool) -> None:
    layers, x = layers_of(kind), sample(rows)
    truth = gradients(layers, x, autocast=autocast)
    assert len(truth) == 2 + len(list(layers.parameters()))
    plans = [mode_plan("memo", alpha=alpha) for alpha in ALPHAS]
    plans += [mode_plan(mode) for mode in ("none", "recompute", "swap")]
    swapped = []
    for plan in plans:
        found, report = managed(layers, x, plan, autocast=autocast)
        assert_same(found, truth)
        assert report.as_planned
        assert report.peak_device_bytes <= report.planned_device_bytes
        swapped.append(report.swapped_bytes)
    assert swapped[: len(ALPHAS)] == sorted(set(swapped[: len(ALPHAS)])), "each alpha swaps more"


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_each_layer_and_group_may_have_a_cut_of_its_own(kind: str) -> None:
    layers, x = layers_of(kind), sample()
    plan = ActivationPlan(
        layers=(
            LayerPlan.of(snap(NUM_TOKENS, keep=0.25, swap=0.3)),
            LayerPlan(
                input=snap(NUM_TOKENS, keep=0.4, swap=0.6),
                attention=Split(keep=NUM_TOKENS),
                before_attention=snap(NUM_TOKENS, swap=0.5),
                after_attention=snap(NUM_TOKENS, keep=0.2),
            ),
            LayerPlan.of(Split(recompute=NUM_TOKENS), input=Split(keep=NUM_TOKENS)),
        )
    )
    found, report = managed(layers, x, plan)
    assert_same(found, gradients(layers, x))
    assert min(report.kept_bytes, report.swapped_bytes, report.recomputed_bytes) > 0


def trained(kind: str, plan: ActivationPlan | None) -> list[Tensor]:
    layers, x = layers_of(kind), sample()
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2)
    manager = ActivationManager(layers, plan or mode_plan("none"))
    for step in range(5):
        with manager:
            gradients(layers, x + step)
        optimizer.step()
        assert manager.report().host_bytes == 0
    return [parameter.detach() for parameter in layers.parameters()]


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_weights_after_five_optimizer_steps_are_the_same(kind: str) -> None:
    truth = trained(kind, None)
    for plan in (mode_plan("memo", alpha=0.3), mode_plan("recompute")):
        assert_same(trained(kind, plan), truth)


@pytest.mark.parametrize("num_tokens", [96, 200, 641, 1280])
def test_another_length_than_planned_is_cut_in_the_same_shares_and_counted(num_tokens: int) -> None:
    layers, x = layers_of("llama"), sample(num_tokens=num_tokens)
    found, report = managed(layers, x, mode_plan("memo", alpha=0.5))
    assert_same(found, gradients(layers, x))
    assert report.num_other_lengths == 3 and not report.as_planned


class Moody(GptLayer):
    """Saves one tensor more when told to."""

    extra = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin() if self.extra else super().forward(x)


def test_a_tensor_more_than_the_first_time_is_managed_too_and_counted() -> None:
    torch.manual_seed(1)
    layers, x = nn.ModuleList([Moody()]), sample()
    manager = ActivationManager(layers, everywhere(LayerPlan.of(snap(NUM_TOKENS, swap=0.5)), 1))
    for extra in (False, True, False):
        layers[0].extra = extra  # type: ignore[assignment]
        with manager:
            found = gradients(layers, x)
        assert_same(found, gradients(layers, x))
        assert manager.report().num_other_forms == extra


def test_attention_is_never_recomputed_by_token() -> None:
    layers, x = layers_of("gpt", 1), sample()
    calls = 0

    def count(*args: object) -> None:
        nonlocal calls
        calls += 1

    layers[0].register_forward_hook(count)
    found, report = managed(layers, x, everywhere(LayerPlan.of(Split(recompute=NUM_TOKENS)), 1))
    assert_same(found, gradients(layers, x))
    attention = NUM_TOKENS * (WIDTH + 4) * 4  # its output and, for each of the 4 heads, log-sum-exp
    assert report.swapped_bytes == NUM_TOKENS * WIDTH * 4 + attention
    assert report.not_by_token_bytes == attention
    assert report.as_planned and report.num_left_whole == 0
    assert calls == 2, "the layer's own code ran once in each of the two passes"


class Convolved(nn.Module):
    """Tokens see their neighbours, and their running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.conv(x.transpose(1, 2)).transpose(1, 2).tanh()
        return x.add(self.out(torch.sigmoid(mixed + x.cumsum(1)).sin()))


class Rough(nn.Module):
    """In-place operators, batch norm with running statistics, a slice that is written to, parts that are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.transpose(1, 2)).transpose(1, 2).exp()
        buffer = torch.zeros_like(y)
        buffer[:, ::2] = y[:, ::2].sin()
        z = F.relu(self.out(buffer).mul_(2.0), inplace=True)
        return x + F.dropout(torch.softmax(z, -1) * y, 0.3, training=True)


class MathAttention(GptLayer):
    """Attention written out, with dropout on its weights."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2) / 8).softmax(-1)
        out: Tensor = self.drop(scores) @ v
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", [Convolved, Rough, MathAttention])
def test_layers_that_were_not_thought_of_keep_their_gradients(kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    layers, x = nn.ModuleList([kind() for _ in range(2)]), sample(2, 256)
    truth = gradients(layers, x)
    buffers = [each.clone() for each in layers.buffers()]
    for plan in (
        LayerPlan.of(snap(256, swap=0.5)),
        LayerPlan.of(Split(recompute=256)),
        uniform("recompute", num_layers=1, num_tokens=256).layers[0],
        LayerPlan.of(snap(256, keep=0.5, swap=0.5)),
    ):
        for each in layers.modules():
            if isinstance(each, nn.BatchNorm1d):
                each.reset_running_stats()
        found, _ = managed(layers, x, everywhere(plan, 2))
        assert_same(found, truth)
        assert_same(list(layers.buffers()), buffers)


def test_what_was_found_to_mix_tokens_is_counted_and_told() -> None:
    torch.manual_seed(1)
    layers, x = nn.ModuleList([Convolved()]), sample()
    found, report = managed(layers, x, everywhere(LayerPlan.of(Split(recompute=NUM_TOKENS)), 1))
    assert_same(found, gradients(layers, x))
    unit = NUM_TOKENS * WIDTH * 4
    assert report.swapped_bytes == unit + report.not_by_token_bytes, "the input, and what mixes"
    assert report.not_by_token_bytes >= unit and report.recomputed_bytes >= unit
    assert f"not made again by token: {report.not_by_token_bytes / 2**20:,.1f} MiB" in str(report)
    assert report.as_planned, "a plan for tokens says where to put the rest"
    _, swapping = managed(layers, x, everywhere(LayerPlan.of(Split(swap=NUM_TOKENS)), 1))
    assert swapping.not_by_token_bytes == 0, "nothing was to be made again"


def test_what_cannot_be_done_twice_where_all_is_to_be_recomputed_is_counted_as_off_plan() -> None:
    torch.manual_seed(1)
    layers, x = nn.ModuleList([Rough()]), sample()
    _, report = managed(
        layers, x, everywhere(uniform("recompute", num_layers=1, num_tokens=NUM_TOKENS).layers[0], 1)
    )
    assert report.num_left_whole > 0 and not report.as_planned
    assert f"{report.num_left_whole} storages whole" in str(report)
    assert report.not_by_token_bytes > 0


def test_a_declared_core_is_swapped_whole_and_the_rest_still_recomputed() -> None:
    layers, x = layers_of("llama"), sample()
    plan = mode_plan("memo", alpha=0.0)
    _, free = managed(layers, x, plan)
    found, report = managed(
        layers, x, plan, segments=TokenSegments(pre=["attn_norm"], core=["attn"], post=["mlp"])
    )
    assert_same(found, gradients(layers, x))
    assert free.swapped_bytes < report.swapped_bytes
    assert 0 < report.recomputed_bytes < free.recomputed_bytes
