"""The config loader: precedence, origins, types, and every problem of every layer at once."""

import json
from dataclasses import is_dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.core.config import RunConfig, flatten, nested
from distrain.core.errors import ConfigError, Problem
from distrain.core.load import Loaded, load, parse
from distrain.core.vocabulary import Schedule


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str, **environ: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides=overrides, environ=environ)
    return list(caught.value.problems)


VALUES: dict[type, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(st.characters(codec="utf-8")),
}


def values_of(kind: type) -> st.SearchStrategy[Any]:
    """Any value of a type that a key can have."""
    if rows := [each for each in get_args(kind) if is_dataclass(each)]:
        cells = {leaf: values_of(cell) for leaf, cell in get_type_hints(rows[0]).items()}
        row: Any = rows[0]
        return st.lists(st.builds(row, **cells), max_size=2).map(tuple)
    return st.sampled_from(list(kind)) if issubclass(kind, StrEnum) else VALUES[kind]


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """Any RunConfig that the types allow, sensible or not."""
    config = RunConfig()
    for name, hint in get_type_hints(RunConfig).items():
        kinds = get_type_hints(hint) if hasattr(hint, "__dataclass_fields__") else {name: hint}
        values = {leaf: draw(values_of(kind)) for leaf, kind in kinds.items()}
        config = replace(config, **({name: hint(**values)} if kinds.keys() != {name} else values))
    return config


@given(configs())
def test_what_nested_writes_parse_reads_back(config: RunConfig) -> None:
    assert parse(json.loads(json.dumps(nested(config)))) == config


def test_an_empty_file_gives_the_defaults_with_their_origin(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, ""), environ={})
    assert loaded.config == RunConfig()
    assert loaded.origins == dict.fromkeys(flatten(RunConfig()), "default")


def test_later_layers_win_and_the_origin_names_the_winner(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 1\n\n[train]\nsteps = 1\nlog_every = 1\neval_every = 1\n")
    loaded = load(
        path,
        overrides=["train.steps=3", "train.steps=4"],
        environ={"DISTRAIN_TRAIN__STEPS": "2", "DISTRAIN_TRAIN__LOG_EVERY": "2", "DISTRAIN_SEED": "2"},
    )
    train = loaded.config.train
    assert (train.steps, train.log_every, train.eval_every, loaded.config.seed) == (4, 2, 1, 2)
    assert loaded.origins["train.steps"] == "--set train.steps"
    assert loaded.origins["train.log_every"] == "environment DISTRAIN_TRAIN__LOG_EVERY"
    assert loaded.origins["seed"] == "environment DISTRAIN_SEED"
    assert loaded.origins["train.eval_every"] == f"{path}:6"
    assert loaded.origins["train.eval_sequences"] == "default"


def test_the_environment_of_the_process_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTRAIN_OPTIMIZER__LR", "0.5")
    assert load(write(tmp_path, "")).config.optimizer.lr == 0.5


def test_variables_that_are_no_config_keys_are_left_alone(tmp_path: Path) -> None:
    environ = {
        "DISTRAIN_PLAN": "plan.json",
        "DISTRAIN_CACHE_DIR": "/x",
        "DISTRAIN_TRAIN": "x",
        "TRAIN__STEPS": "x",
    }
    assert load(write(tmp_path, ""), environ=environ).config == RunConfig()


def test_json_and_toml_mean_the_same(tmp_path: Path) -> None:
    toml = write(tmp_path, 'run_dir = "x"\n[parallel]\ntp = 2\nschedule = "zbv"\n')
    tables = {"run_dir": "x", "parallel": {"tp": 2, "schedule": "zbv"}}
    as_json = write(tmp_path, json.dumps(tables), "run.json")
    loaded = load(as_json, environ={})
    assert loaded.config == load(toml, environ={}).config
    assert loaded.config.parallel.schedule is Schedule.ZBV
    assert loaded.origins["parallel.tp"] == str(as_json)


def test_origins_find_dotted_keys_and_inline_tables_as_far_as_they_can(tmp_path: Path) -> None:
    path = write(tmp_path, '# train.steps = 9\nmodel.preset = "7b"\ntrain = { steps = 5 }\n')
    loaded = load(path, environ={})
    assert loaded.origins["model.preset"] == f"{path}:2"
    assert (loaded.config.train.steps, loaded.origins["train.steps"]) == (5, str(path))


@pytest.mark.parametrize("where", ["file", "environment", "override", "long"])
def test_parallel_auto_turns_the_planner_on_from_every_layer(tmp_path: Path, where: str) -> None:
    text = {"file": 'parallel = "auto"', "long": "[parallel]\nauto = true"}.get(where, "")
    environ = {"DISTRAIN_PARALLEL": "auto"} if where == "environment" else {}
    overrides = ["parallel=auto"] if where == "override" else []
    loaded: Loaded = load(write(tmp_path, text), overrides=overrides, environ=environ)
    assert loaded.config.parallel.auto
    assert loaded.origins["parallel.auto"] != "default"


def test_an_int_stands_for_a_float_and_nothing_else_is_converted(tmp_path: Path) -> None:
    path = write(tmp_path, "[optimizer]\nlr = 1\n")
    lr = load(path, environ={}).config.optimizer.lr
    assert (lr, type(lr)) == (1.0, float)
    for text, allowed in {
        "[train]\nsteps = 1.0": "a whole number",
        "[train]\nsteps = true": "a whole number",
        '[train]\nsteps = "1"': "a whole number",
        "[optimizer]\nlr = true": "a finite number",
        "[optimizer]\nlr = nan": "a finite number",
        "[optimizer]\nlr = inf": "a finite number",
        "[model]\nparallel_block = 1": "true or false",
        "[model]\npreset = 7": "text",
        "seed = {}": "a whole number",
        "[train]\nsteps = [1]": "a whole number",
    }.items():
        (problem,) = problems_of(write(tmp_path, text))
        assert problem.allowed == allowed, text
        assert "has the wrong type" in problem.error


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("YES", True), ("1", True), ("false", False), ("no", False), ("0", False)],
)
def test_text_spells_booleans(tmp_path: Path, text: str, value: bool) -> None:
    loaded = load(write(tmp_path, ""), overrides=[f"model.parallel_block={text}"], environ={})
    assert loaded.config.model.parallel_block is value


def test_text_layers_are_parsed_by_the_type_of_the_key(tmp_path: Path) -> None:
    overrides = [
        "optimizer.lr=1e-3",
        "data.path=/a=b",
        "parallel.data=zero1",
        "run_dir= x ",
        "train.steps=1_000",
    ]
    config = load(write(tmp_path, ""), overrides=overrides, environ={}).config
    assert (config.optimizer.lr, config.data.path, config.run_dir) == (1e-3, "/a=b", "x")
    assert (config.parallel.data, config.train.steps) == ("zero1", 1000)
    bad = ["train.steps=5.0", "optimizer.lr=nan", "optimizer.lr=fast", "model.parallel_block=maybe"]
    found = problems_of(write(tmp_path, ""), *bad)
    assert len(found) == len(bad)


def test_an_unknown_choice_names_the_choices_and_the_nearest(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, '[parallel]\nschedule = "interleave"\n'))
    assert problem.allowed == "gpipe, 1f1b, interleaved, zbv"
    assert problem.hint == "parallel.schedule = interleaved"
    assert "run.toml:2" in problem.got


@pytest.mark.parametrize(
    ("text", "error", "hint"),
    [
        ("[train]\nstep = 1", "[train] has no key step", "train.steps"),
        ("[train]\nlr = 1", "[train] has no key lr", "optimizer.lr"),
        ("[optimiser]\nlr = 1", "there is no table optimiser", "optimizer"),
        ("[modle]", "there is no table modle", "model"),
        ("sead = 1", "there is no key or table sead", "seed"),
        ("micro_batches = 1", "there is no key or table micro_batches", "parallel.micro_batches"),
        ("zzz = 1", "there is no key or table zzz", ""),
        ("train = 3", "train is a table, not a value", "[train]"),
        ('parallel = "atuo"', "parallel is a table, not a value", "[parallel]"),
        ("[train.steps]\nx = 1", "train.steps has the wrong type", ""),
    ],
)
def test_an_unknown_key_names_the_allowed_and_the_nearest(
    tmp_path: Path, text: str, error: str, hint: str
) -> None:
    (problem,) = problems_of(write(tmp_path, text))
    assert (problem.error, problem.hint) == (error, hint)
    assert problem.allowed
    assert "run.toml:" in problem.got


def test_an_unknown_double_underscore_variable_is_a_problem(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, ""), DISTRAIN_TRAIN__STEP="5")
    assert problem.error == "[train] has no key step"
    assert "environment DISTRAIN_TRAIN__STEP" in problem.got


def test_all_problems_of_all_layers_come_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path, 'sead = 1\n[train]\nsteps = "x"\nlog = 1\n')
    found = problems_of(
        path, "train.steps", "data.seq_len=long", DISTRAIN_MODEL__PRESETS="7b", DISTRAIN_SEED="x"
    )
    assert sorted(problem.error for problem in found) == [
        "[model] has no key presets",
        "[train] has no key log",
        "an override has no value",
        "data.seq_len has the wrong type",
        "seed has the wrong type",
        "there is no key or table sead",
        "train.steps has the wrong type",
    ]


@pytest.mark.parametrize(
    ("name", "text", "error", "detail"),
    [
        ("run.toml", "[train]\nsteps = \n", "the config file is not valid TOML", "line 2, column 9"),
        ("run.toml", "seed = 1\nseed = 2\n", "the config file is not valid TOML", "line 2"),
        ("run.json", '{"seed": }', "the config file is not valid JSON", "line 1 column 10"),
        ("run.json", "[1]", "the config file is not a table of keys", "list"),
        ("run.yaml", "seed: 1", "this is not the name of a config file", "run.yaml"),
    ],
)
def test_a_file_that_cannot_be_parsed_says_where(
    tmp_path: Path, name: str, text: str, error: str, detail: str
) -> None:
    (problem,) = problems_of(write(tmp_path, text, name))
    assert problem.error == error
    assert detail in problem.got


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe")
    (problem,) = problems_of(path)
    assert problem.error == "the config file is not valid TOML"


def test_a_missing_file_names_the_one_beside_it_and_the_other_layers_are_still_checked(
    tmp_path: Path,
) -> None:
    write(tmp_path, "", "small.toml")
    missing, override = problems_of(tmp_path / "smal.toml", "train.step=1")
    assert missing.error == "the config file cannot be read"
    assert "No such file" in missing.got
    assert missing.hint == str(tmp_path / "small.toml")
    assert override.error == "[train] has no key step"


def test_a_directory_is_no_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").mkdir()
    (problem,) = problems_of(tmp_path / "run.toml")
    assert "Is a directory" in problem.got


TIERS = """\
[checkpoint]
every = 2

[[checkpoint.tiers]]
url = "near-{node}"
shared = false

[[checkpoint.tiers]]
url = "s3://bucket/run"
every = 10
bytes_per_s = 5
"""


def test_tables_of_a_list_become_rows_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, TIERS)
    loaded = load(path, environ={})
    near, far = loaded.config.checkpoint.tiers
    assert (near.url, near.shared, near.every, far.every, far.bytes_per_s) == (
        "near-{node}",
        False,
        1,
        10,
        5.0,
    )
    assert loaded.origins["checkpoint.tiers"] == f"{path}:4"
    text = json.dumps([{"url": "elsewhere"}])
    (only,) = load(path, overrides=[f"checkpoint.tiers={text}"], environ={}).config.checkpoint.tiers
    assert only.url == "elsewhere"
    assert not load(path, environ={"DISTRAIN_CHECKPOINT__TIERS": "[]"}).config.checkpoint.tiers


def test_every_problem_of_every_table_of_a_list_is_named(tmp_path: Path) -> None:
    text = TIERS.replace("shared = false", 'shared = "no"').replace("bytes_per_s = 5", "everyy = 5\nname = 7")
    found = problems_of(write(tmp_path, text))
    assert [problem.error for problem in found] == [
        "checkpoint.tiers.shared has the wrong type",
        "[[checkpoint.tiers]] has no key everyy",
        "checkpoint.tiers.name has the wrong type",
    ]
    assert "table 1" in found[0].got and "table 2" in found[1].got and found[1].hint == "every"
    for words in ("tiers = 3", "tiers = [1]", 'tiers = { url = "x" }'):
        (problem,) = problems_of(write(tmp_path, f"[checkpoint]\n{words}\n"))
        assert problem.error == "checkpoint.tiers is a list of tables"
    (problem,) = problems_of(write(tmp_path, ""), "checkpoint.tiers=/a/folder")
    assert "JSON" in problem.allowed


def test_parse_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"train": {"steps": 1, "step": 1}, "seed": "x"})
    assert len(caught.value.problems) == 2
