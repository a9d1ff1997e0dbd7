"""Refusals: every impossible run is refused, with all its problems at once, and what the messages advise works."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.core.checks import CHOICES, check_layout, check_run
from distrain.core.config import RunConfig
from distrain.core.errors import Problem
from distrain.core.load import load
from distrain.core.vocabulary import PRESETS, DataParallel, Degrees, ModelShape, Schedule

# A model that tp 4 and 8 stages share out evenly, so that a test breaks one thing at a time.
EVEN = (
    "model.d_model=64",
    "model.num_layers=8",
    "model.num_heads=8",
    "model.num_kv_heads=4",
    "model.d_ffn=128",
    "model.vocab_size=512",
)


def configured(*overrides: str) -> RunConfig:
    """EVEN with ``overrides``, each ``key=value``."""
    return load(Path(__file__).parent / "empty.toml", overrides=[*EVEN, *overrides], environ={}).config


def errors(problems: list[Problem]) -> list[str]:
    return sorted(problem.error for problem in problems)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_defaults_run_on_one_rank_with_every_preset(preset: str) -> None:
    config = load(
        Path(__file__).parent / "empty.toml", overrides=[f"model.preset={preset}"], environ={}
    ).config
    assert check_run(config, 1) == []


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (4, ["parallel.tp=4"]),
        (8, ["parallel.pp=8"]),
        (5, ["parallel.pp=5"]),
        (4, ["parallel.tp=2", "parallel.pp=2", "parallel.micro_batches=2"]),
        (16, ["parallel.tp=2", "parallel.pp=2", "parallel.dp=4", "parallel.micro_batches=4"]),
        (4, ["parallel.pp=4", "parallel.schedule=interleaved", "parallel.vpp=2", "parallel.micro_batches=4"]),
        (4, ["parallel.pp=4", "parallel.schedule=zbv", "parallel.micro_batches=1"]),
        (4, ["parallel.data=hsdp", "parallel.hsdp_shard=2"]),
        (1, ["parallel.data=fsdp2"]),
        (1, ["parallel.data=zero1"]),
        (8, ["parallel=auto", "data.global_batch=7"]),
    ],
)
def test_possible_layouts_pass(world_size: int, overrides: list[str]) -> None:
    assert check_run(configured(*overrides), world_size) == []


LAYOUTS: list[tuple[int, list[str], list[str]]] = [
    (3, ["parallel.tp=2", "parallel.pp=2"], ["there are too few ranks for the layout"]),
    (6, ["parallel.tp=2", "parallel.pp=2"], ["the layout leaves ranks over"]),
    (4, ["parallel.tp=1", "parallel.dp=2"], ["the layout leaves ranks over"]),
    (4, ["parallel.tp=1", "parallel.dp=8"], ["there are too few ranks for the layout"]),
    (
        3,
        ["parallel.tp=3"],
        [
            "parallel.tp does not divide data.seq_len",
            "parallel.tp does not divide model.d_ffn",
            "parallel.tp does not divide model.num_heads",
            "parallel.tp does not divide model.num_kv_heads",
            "parallel.tp does not divide model.vocab_size",
        ],
    ),
    (8, ["parallel.tp=8"], ["parallel.tp does not divide model.num_kv_heads"]),
    (
        16,
        ["parallel.tp=16"],
        ["parallel.tp does not divide model.num_heads", "parallel.tp does not divide model.num_kv_heads"],
    ),
    (4, ["parallel.tp=4", "model.d_ffn=130"], ["parallel.tp does not divide model.d_ffn"]),
    (4, ["parallel.tp=4", "model.vocab_size=258"], ["parallel.tp does not divide model.vocab_size"]),
    (4, ["parallel.tp=4", "data.seq_len=126"], ["parallel.tp does not divide data.seq_len"]),
    (1, ["model.d_model=60"], ["model.num_heads does not divide model.d_model"]),
    (1, ["model.d_model=72"], ["the head dimension is odd, and rotary embedding turns pairs"]),
    (1, ["model.num_kv_heads=3"], ["model.num_kv_heads does not divide model.num_heads"]),
    (1, ["model.num_kv_heads=16"], ["model.num_kv_heads does not divide model.num_heads"]),
    (9, ["parallel.pp=9"], ["there are more pipeline stages than layers"]),
    (8, ["parallel.pp=8", "parallel.schedule=zbv"], ["there are more pipeline stages than layers"]),
    (1, ["parallel.schedule=zbv"], ["schedule zbv needs a pipeline"]),
    (
        1,
        ["parallel.schedule=interleaved"],
        ["schedule interleaved needs a pipeline", "schedule interleaved needs several stages a rank"],
    ),
    (1, ["parallel.schedule=interleaved", "parallel.vpp=2"], ["schedule interleaved needs a pipeline"]),
    (
        2,
        ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.micro_batches=2"],
        ["schedule interleaved needs several stages a rank"],
    ),
    (
        2,
        ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.vpp=3", "parallel.micro_batches=2"],
        ["interleaving needs as many layers on each stage"],
    ),
    (
        4,
        ["parallel.pp=4", "parallel.schedule=interleaved", "parallel.vpp=4", "parallel.micro_batches=4"],
        ["there are more pipeline stages than layers"],
    ),
    (
        4,
        ["parallel.pp=4", "parallel.schedule=interleaved", "parallel.vpp=2", "parallel.micro_batches=2"],
        ["parallel.micro_batches is not a multiple of pp"],
    ),
    (2, ["parallel.pp=2", "parallel.vpp=2"], ["parallel.vpp is not used by schedule 1f1b"]),
    (
        2,
        ["parallel.pp=2", "parallel.vpp=3", "parallel.schedule=zbv"],
        ["parallel.vpp is not used by schedule zbv"],
    ),
    (3, ["parallel.dp=3"], ["data.global_batch is not a multiple of dp x micro_batches"]),
    (2, ["parallel.micro_batches=5"], ["data.global_batch is not a multiple of dp x micro_batches"]),
    (4, ["parallel.data=hsdp"], ["parallel.hsdp_shard is no group of replicas"]),
    (4, ["parallel.data=hsdp", "parallel.hsdp_shard=4"], ["parallel.hsdp_shard is no group of replicas"]),
    (4, ["parallel.data=hsdp", "parallel.hsdp_shard=1"], ["parallel.hsdp_shard is no group of replicas"]),
    (8, ["parallel.data=hsdp", "parallel.hsdp_shard=3"], ["parallel.hsdp_shard is no group of replicas"]),
    (1, ["parallel.data=hsdp", "parallel.hsdp_shard=2"], ["parallel.hsdp_shard is no group of replicas"]),
    (4, ["parallel.hsdp_shard=2"], ["parallel.hsdp_shard is not used by data = ddp"]),
    (1, ["parallel.tp=0", "parallel.pp=-1"], ["parallel.pp is out of range", "parallel.tp is out of range"]),
    (1, ["parallel.dp=-2"], ["parallel.dp is out of range"]),
    (1, ["parallel.micro_batches=0"], ["parallel.micro_batches is out of range"]),
    (1, ["data.global_batch=0"], ["data.global_batch is out of range"]),
    (1, ["data.seq_len=1"], ["data.seq_len is out of range"]),
    (1, ["model.num_layers=-1"], ["model.num_layers is out of range"]),
    (0, ["parallel.dp=1"], ["the world size is out of range"]),
]


@pytest.mark.parametrize(("world_size", "overrides", "expected"), LAYOUTS)
def test_an_impossible_layout_is_refused_for_exactly_its_problems(
    world_size: int, overrides: list[str], expected: list[str]
) -> None:
    problems = check_run(configured(*overrides), world_size)
    assert errors(problems) == expected
    assert all(problem.got and problem.allowed for problem in problems)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        case[:2] for case in LAYOUTS if not case[2][0].endswith("out of range")
    ],  # there the range is the advice
)
def test_following_the_advice_leads_to_a_run_that_passes(world_size: int, overrides: list[str]) -> None:
    for _ in range(4):  # one change may call for the next: 1f1b has no use for vpp
        problems = check_run(configured(*overrides), world_size)
        for problem in problems:
            if problem.hint.startswith("--set "):
                overrides = [*overrides, problem.hint.removeprefix("--set ").partition(" or ")[0]]
            else:
                world_size = int(problem.hint.split()[1])  # "start 4 ranks"
    assert check_run(configured(*overrides), world_size) == []


def test_many_mistakes_are_listed_together() -> None:
    overrides = [
        "model.num_kv_heads=3",
        "model.vocab_size=250",
        "data.source=text",
        "data.packing=fixd",
        "data.held_out=0.9",
        "data.global_batch=9",
        "optimizer.name=adam",
        "optimizer.lr=0",
        "optimizer.beta2=1",
        "train.dtype=float16",
        "parallel.tp=4",
        "parallel.pp=9",
        "parallel.micro_batches=2",
        "parallel.hsdp_shard=2",
        "timeouts.step_s=5",
        "launch.device=tpu",
    ]
    assert errors(check_run(configured(*overrides), 35)) == [
        "data.global_batch is not a multiple of dp x micro_batches",
        "data.held_out is out of range",
        "data.packing knows no such choice",
        "data.path is missing",
        "launch.device knows no such choice",
        "model.num_kv_heads does not divide model.num_heads",
        "model.vocab_size is too small for the byte tokenizer",
        "optimizer.beta2 is out of range",
        "optimizer.lr is out of range",
        "optimizer.name knows no such choice",
        "parallel.hsdp_shard is not used by data = ddp",
        "parallel.tp does not divide model.num_kv_heads",
        "parallel.tp does not divide model.vocab_size",
        "there are more pipeline stages than layers",
        "there are too few ranks for the layout",
        "timeouts.step_s must be longer than timeouts.collective_s",
        "train.dtype knows no such choice",
    ]


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("seed", ["-1", str(2**63)], ["0"]),
        ("model.rope_theta", ["-1.0"], ["500000"]),
        ("model.window", ["-1"], ["0", "7"]),
        ("data.held_out", ["0", "-0.1", "0.51"], ["0.5", "1e-6"]),
        ("optimizer.lr", ["0", "-1e-3"], ["1e-9"]),
        ("optimizer.min_lr", ["-1e-9"], ["0", "3e-4"]),
        ("optimizer.beta1", ["-0.1", "1"], ["0", "0.999"]),
        ("optimizer.beta2", ["-0.1", "1.5"], ["0", "0.999"]),
        ("optimizer.eps", ["0", "-1"], ["1e-12"]),
        ("optimizer.weight_decay", ["-0.1"], ["0"]),
        ("optimizer.clip", ["-1"], ["0"]),
        ("optimizer.warmup_steps", ["-1"], ["0", "1000"]),
        ("train.steps", ["0", "-5"], ["20"]),
        ("train.eval_every", ["-1"], ["0"]),
        ("train.eval_sequences", ["0"], ["1"]),
        ("train.log_every", ["0"], ["1"]),
        ("launch.ranks", ["0"], ["1"]),
        ("cluster.devices_per_node", ["0"], ["1"]),
        ("cluster.host_memory_gib", ["-1"], ["0"]),
    ],
)
def test_numbers_outside_their_range_are_refused(key: str, bad: list[str], good: list[str]) -> None:
    for value in bad:
        assert f"{key} is out of range" in errors(check_run(configured(f"{key}={value}"), 1)), value
    for value in good:
        assert check_run(configured(f"{key}={value}"), 1) == [], value


@pytest.mark.parametrize("key", list(CHOICES))
def test_an_unknown_choice_is_refused_with_the_nearest(key: str) -> None:
    right = CHOICES[key][-1]
    problems = check_run(configured(f"{key}={right}x"), 1)
    (problem,) = [problem for problem in problems if problem.error == f"{key} knows no such choice"]
    assert right in problem.allowed
    assert problem.hint == f"--set {key}={right}"


def test_the_ranks_and_the_batch_are_judged_even_if_the_preset_is_unknown() -> None:
    assert errors(check_run(configured("model.preset=huge", "parallel.tp=2", "data.global_batch=0"), 3)) == [
        "data.global_batch is out of range",
        "model.preset knows no such choice",
        "the layout leaves ranks over",
    ]


def test_a_final_rate_above_the_peak_is_refused() -> None:
    (problem,) = check_run(configured("optimizer.min_lr=0.1"), 1)
    assert problem.error == "optimizer.min_lr is above optimizer.lr"


def test_auto_layouts_are_still_refused_for_what_no_layout_can_mend() -> None:
    overrides = ["parallel=auto", "model.num_kv_heads=3", "data.global_batch=0", "parallel.tp=7"]
    assert errors(check_run(configured(*overrides), 4)) == [
        "data.global_batch is out of range",
        "model.num_kv_heads does not divide model.num_heads",
    ]


def test_levels_of_storage_are_checked_one_by_one_and_replace_the_one_folder() -> None:
    rows = '[{"url": "a", "every": 0}, {"url": "b", "name": "a", "keep_last": 0}, {"bytes_per_s": -1.0}]'
    config = configured(f"checkpoint.tiers={rows}", "checkpoint.path=c", "checkpoint.keep_last=2")
    assert errors(check_run(config, 1)) == [
        "a tier has no url",
        "bytes_per_s of a tier is out of range",
        "checkpoint.keep_last is not used with checkpoint.tiers",
        "checkpoint.path is not used with checkpoint.tiers",
        "checkpoint.tiers get no snapshots",
        "every of a tier is out of range",
        "keep_last of a tier is out of range",
        "two tiers have the same name or url",
    ]
    good = '[{"url": "near-{node}", "shared": false}, {"url": "s3://bucket/run", "every": 10}]'
    assert not check_run(configured(f"checkpoint.tiers={good}", "checkpoint.every=5"), 1)


def test_sources_that_read_files_need_a_folder_and_the_library_needs_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for source in ("text", "tokens"):
        assert check_run(configured(f"data.source={source}", f"data.path={tmp_path}"), 1) == []
        assert errors(check_run(configured(f"data.source={source}"), 1)) == ["data.path is missing"]
        for path in (file, tmp_path / "none"):
            problems = check_run(configured(f"data.source={source}", f"data.path={path}"), 1)
            assert errors(problems) == ["data.path is no folder"]
    assert errors(check_run(configured(f"data.path={tmp_path}"), 1)) == [
        "data.path is not used by source = stdlib"
    ]


def test_token_files_may_have_any_vocabulary_and_bytes_need_258(tmp_path: Path) -> None:
    tokens = ["data.source=tokens", f"data.path={tmp_path}", "model.vocab_size=16"]
    assert check_run(configured(*tokens), 1) == []
    assert errors(check_run(configured("model.vocab_size=257"), 1)) == [
        "model.vocab_size is too small for the byte tokenizer"
    ]


def test_a_run_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert errors(check_run(configured(f"run_dir={run_dir}"), 1)) == ["run_dir is no folder"]
    assert errors(check_run(configured("run_dir="), 1)) == ["run_dir is empty"]
    assert check_run(configured(f"run_dir={tmp_path / 'new' / 'run'}"), 1) == []


def test_a_plan_with_stages_that_its_schedule_does_not_have_is_refused() -> None:
    assert [problem.error for problem in layout(Degrees(pp=2, vpp=2), Schedule.GPIPE, world_size=2)] == [
        "schedule gpipe fixes the stages a rank"
    ]
    assert layout(Degrees(pp=2, vpp=2), Schedule.ZBV, world_size=2) == []


def test_a_mistyped_size_is_refused_in_no_time() -> None:
    problems = check_run(configured("model.vocab_size=1000000000000000001", "parallel.tp=2"), 2)
    assert errors(problems) == ["parallel.tp does not divide model.vocab_size"]


def layout(
    degrees: Degrees,
    schedule: Schedule,
    *,
    world_size: int,
    data: DataParallel = DataParallel.DDP,
    micro_batches: int = 4,
    global_batch: int = 16,
    seq_len: int = 128,
) -> list[Problem]:
    shape = ModelShape(d_model=64, num_layers=8, num_heads=8, num_kv_heads=4, d_ffn=128, vocab_size=512)
    return check_layout(
        shape,
        degrees,
        schedule=schedule,
        data=data,
        micro_batches=micro_batches,
        global_batch=global_batch,
        seq_len=seq_len,
        world_size=world_size,
    )


SMALL = st.integers(-1, 9)


@settings(max_examples=500)
@given(
    tp=SMALL,
    pp=SMALL,
    dp=SMALL,
    vpp=SMALL,
    dp_shard=SMALL,
    schedule=st.sampled_from(list(Schedule)),
    data=st.sampled_from(list(DataParallel)),
    micro_batches=SMALL,
    global_batch=st.integers(-1, 40),
    seq_len=st.integers(0, 20),
    spare=st.sampled_from([0, 0, 0, -1, 1, 4]),
)
def test_a_layout_passes_exactly_if_everything_comes_out_even(
    tp: int,
    pp: int,
    dp: int,
    vpp: int,
    dp_shard: int,
    schedule: Schedule,
    data: DataParallel,
    micro_batches: int,
    global_batch: int,
    seq_len: int,
    spare: int,
) -> None:
    world_size = max(1, tp * pp * dp + spare)
    problems = layout(
        Degrees(tp=tp, pp=pp, dp=dp, vpp=vpp, dp_shard=dp_shard),
        schedule,
        world_size=world_size,
        data=data,
        micro_batches=micro_batches,
        global_batch=global_batch,
        seq_len=seq_len,
    )
    stages = {"interleaved": lambda: pp > 1 and vpp > 1 and 8 % (pp * vpp) == 0 and micro_batches % pp == 0}
    possible = (
        min(tp, pp, dp, vpp, micro_batches, global_batch) >= 1
        and seq_len >= 2
        and tp * pp * dp == world_size
        and tp in (1, 2, 4)
        and seq_len % tp == 0
        and pp * vpp <= 8
        and global_batch % (dp * micro_batches) == 0
        and (data != "hsdp" or (1 < dp_shard < dp and dp % dp_shard == 0))
        and stages.get(schedule, lambda: pp == 1 or vpp == (2 if schedule == "zbv" else 1))()
        and (schedule != "zbv" or pp > 1)
    )
    assert (problems == []) == possible, problems
    assert len(set(problems)) == len(problems)
