"""Settings: who wins, who is named, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.config import COMPRESSIONS, Settings, as_environment, resolve
from zml.errors import CONFIG, USAGE, ZmlError


def write(folder: Path, text: str, name: str = "zml.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    write(tmp_path, "workers = 2\nshards = 3\nstaleness = 5\n")
    resolved = resolve({"workers": 8}, {"ZML_WORKERS": "4", "ZML_SHARDS": "6", "PATH": "/bin"})
    assert resolved.settings == Settings(workers=8, shards=6, staleness=5)
    origins = {key: origin for key, origin in resolved.origins.items() if origin != "default"}
    assert origins == {"workers": "flag", "shards": "ZML_SHARDS", "staleness": "zml.toml"}


def test_without_anything_everything_is_default() -> None:
    resolved = resolve({}, {})
    assert resolved.settings == Settings()
    assert set(resolved.origins.values()) == {"default"}
    assert resolved.settings.mode == "sync"


def test_a_named_file_is_read_instead_of_the_default_one_and_must_exist(tmp_path: Path) -> None:
    write(tmp_path, "workers = 2\n")
    write(tmp_path, "workers = 7\n", "other.toml")
    assert resolve({}, {}, "other.toml").settings.workers == 7
    assert resolve({}, {"ZML_CONFIG": "other.toml"}).settings.workers == 7
    with pytest.raises(ZmlError) as caught:
        resolve({}, {}, "none.toml")
    assert (caught.value.code, caught.value.what) == (CONFIG, "there is no configuration file none.toml")


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("wrokers = 2", "zml.toml has an unknown key wrokers", "Did you mean workers?"),
        ("lease = 2.0", "zml.toml has an unknown key lease", "Did you mean lease_s?"),
        ("zzz = 2", "zml.toml has an unknown key zzz", "`zml config show` lists every key."),
        ("workers = '2'", "zml.toml: workers = '2': expected int, got str", ""),
        ("workers = 0", "zml.toml: workers = 0: expected int >= 1", ""),
        ("staleness = -1", "zml.toml: staleness = -1: expected int >= 0", ""),
        (
            "compress = 'zip'",
            "zml.toml: compress: 'zip' is no compression: it is one of none, bf16, topk, auto",
            COMPRESSIONS,
        ),
        ("heartbeat_s = 0", "zml.toml: heartbeat_s = 0: expected float > 0.0", ""),
    ],
)
def test_a_bad_file_is_refused_by_key_and_value(tmp_path: Path, text: str, what: str, fix: str) -> None:
    write(tmp_path, text)
    with pytest.raises(ZmlError) as caught:
        resolve({}, {})
    assert (caught.value.code, caught.value.what, caught.value.fix) == (CONFIG, what, fix)
    assert caught.value.exit_code == 3


def test_a_file_that_is_not_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, "workers = 2\nshards =\n")
    with pytest.raises(ZmlError, match=r"zml\.toml is not TOML: .*line 2"):
        resolve({}, {})


def test_a_misspelt_variable_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(ZmlError) as caught:
        resolve({}, {"ZML_WROKERS": "2"})
    assert caught.value.what == "the environment has an unknown key ZML_WROKERS"
    assert caught.value.fix == "Did you mean ZML_WORKERS?"


def test_variables_between_processes_of_zml_are_no_settings() -> None:
    assert resolve({}, {"ZML_SEAT": "{}", "ZML_FAILURE": "/x", "ZML_PARENT": "1"}).settings == Settings()


def test_a_bad_flag_is_a_mistake_of_usage() -> None:
    with pytest.raises(ZmlError) as caught:
        resolve({"staleness": -1}, {})
    assert (caught.value.code, caught.value.exit_code) == (USAGE, 2)
    assert caught.value.what == "--staleness = -1: expected int >= 0"


def test_backups_that_have_no_place_are_refused_with_both_origins() -> None:
    with pytest.raises(ZmlError) as caught:
        resolve({"replicas": 1}, {})
    assert caught.value.code == CONFIG
    assert "replicas = 1 (flag) with shards = 1 (default): the backup of a shard lives" in caught.value.what
    with pytest.raises(ZmlError, match=r"replicas = 2 \(flag\): a shard has one backup at most"):
        resolve({"replicas": 2, "shards": 4}, {})
    assert resolve({"replicas": 1, "shards": 2}, {}).settings.replicas == 1


def test_a_lease_shorter_than_three_heartbeats_is_refused_with_both_origins() -> None:
    with pytest.raises(ZmlError, match=r"lease_s = 0\.4 \(ZML_LEASE_S\).*heartbeats of 0\.15 s \(default\)"):
        resolve({}, {"ZML_LEASE_S": "0.4"})


@pytest.mark.parametrize(
    ("written", "staleness", "mode"),
    [("0", 0, "sync"), ("sync", 0, "sync"), ("4", 4, "staleness 4"), ("async", None, "async")],
)
def test_the_mode_can_be_written_in_words(written: str, staleness: int | None, mode: str) -> None:
    settings = resolve({}, {"ZML_STALENESS": written}).settings
    assert (settings.staleness, settings.mode) == (staleness, mode)


def test_addresses_are_a_list_in_files_and_separated_by_commas_in_variables(tmp_path: Path) -> None:
    write(tmp_path, 'coordinator = ["tcp://a:1", "tcp://b:2"]')
    assert resolve({}, {}).settings.coordinator == ("tcp://a:1", "tcp://b:2")
    assert resolve({}, {"ZML_COORDINATOR": "tcp://c:3, ipc:///d"}).settings.coordinator == (
        "tcp://c:3",
        "ipc:///d",
    )


settings_that_work = st.builds(
    Settings,
    job=st.text("abc-_1", min_size=1),
    workers=st.integers(1, 1000),
    staleness=st.none() | st.integers(0, 100),
    compress=st.sampled_from(["none", "bf16"]),
    bind=st.lists(st.sampled_from(["tcp://127.0.0.1:0", "ipc:///tmp/x"]), max_size=2).map(tuple),
    lease_s=st.floats(1.0, 100.0),
    keep_output=st.sampled_from(["first", "all", "none"]),
)


@given(settings_that_work)
def test_all_settings_survive_the_way_through_the_environment(settings: Settings) -> None:
    """A launcher hands them to the processes it starts."""
    assert resolve({}, as_environment(settings)).settings == settings


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text())))
def test_any_flags_are_settled_or_refused(flags: dict[str, Any]) -> None:
    try:
        resolve({key: flags[key] for key in flags.keys() & {"workers", "staleness", "bind", "job"}}, {})
    except ZmlError as error:
        assert error.exit_code in (2, 3)


def test_the_account_of_the_settings_is_json() -> None:
    told = json.loads(json.dumps(resolve({"staleness": "async"}, {}).as_json()))
    assert told["settings"]["staleness"] is None
    assert told["origins"]["staleness"] == "flag"


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"lr_scaling": "linear", "staleness": "async"}, "lr_scaling = linear (flag) with async (flag)"),
        (
            {"lr_scaling": "sqrt", "compress": "topk:1%"},
            "with the optimizer on the workers, as with compress",
        ),
        ({"lr_scaling": "sqrt", "local_steps": 4}, "and local_steps = 4"),
        ({"staleness_damping": True}, "staleness_damping = true (flag) with sync (default)"),
        ({"lr_warm_up_steps": 5}, "lr_warm_up_steps = 5 (flag) without lr_scaling"),
        ({"lr_base_workers": 5}, "lr_base_workers = 5 (flag) without lr_scaling"),
    ],
)
def test_a_rule_on_learning_rates_that_would_mean_nothing_is_refused(
    flags: dict[str, Any], what: str
) -> None:
    with pytest.raises(ZmlError) as refused:
        resolve(flags, {})
    assert refused.value.code == CONFIG and what in refused.value.what
    assert refused.value.fix


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (
            {"outer_lr": 0.7},
            "outer_lr = 0.7 (flag) with compress = none (default) and optimizer_on = auto (default)",
        ),
        ({"outer_lr": 0.7, "compress": "bf16"}, "outer_lr = 0.7 (flag) with compress = bf16 (flag)"),
        (
            {"outer_momentum": 0.9, "compress": "topk:1%", "optimizer_on": "shard"},
            "outer_momentum = 0.9 (flag) with compress = topk:1%:int4 (flag) and optimizer_on = shard (flag)",
        ),
        ({"residual_decay": 0.95}, "residual_decay = 0.95 (flag) with compress = none (default)"),
        ({"residual_decay": 0.95, "local_steps": 4}, "nothing waits"),
        ({"warm_up_steps": 5, "compress": "bf16"}, "warm_up_steps = 5 (flag) with compress = bf16 (flag)"),
        ({"warm_up_steps": 5, "compress": "auto"}, "no density falls"),
    ],
)
def test_what_would_do_nothing_to_the_workers_updates_is_refused(flags: dict[str, Any], what: str) -> None:
    with pytest.raises(ZmlError) as refused:
        resolve(flags, {})
    assert refused.value.code == CONFIG and what in refused.value.what
    assert refused.value.fix.startswith(f"Leave {next(iter(flags))} out")


def test_what_is_said_of_the_workers_updates_where_there_are_some() -> None:
    for flags in (
        {"outer_lr": 0.7, "outer_momentum": 0.9, "local_steps": 4},
        {"outer_lr": 1.0, "outer_momentum": 0.9, "optimizer_on": "worker"},
        {"outer_lr": 1.0, "residual_decay": 0.95, "compress": "auto"},
        {"residual_decay": 0.95, "warm_up_steps": 5, "compress": "topk:1%", "optimizer_on": "shard"},
        {"outer_lr": 0.0, "outer_momentum": 0.0, "residual_decay": 1.0, "warm_up_steps": -1},
        {"warm_up_steps": 0},
    ):
        resolved = resolve(flags, {})
        assert resolve({}, as_environment(resolved.settings)).settings == resolved.settings, (
            "as the processes of a job are told"
        )


def test_rules_on_learning_rates_where_they_mean_something() -> None:
    for flags in (
        {"lr_scaling": "linear", "lr_warm_up_steps": 100, "lr_base_workers": 4, "compress": "bf16"},
        {"lr_scaling": "sqrt", "compress": "topk:1%", "optimizer_on": "shard"},
        {"staleness_damping": True, "staleness": "async", "compress": "topk:1%"},
        {"staleness_damping": "true", "staleness": 3},
    ):
        assert resolve(flags, {}).settings
