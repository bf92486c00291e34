"""The keys of `reclaim`, and changing them by words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvaqemu.config import load_vm
from hvaqemu.errors import ConfigError
from hvaqemu.reclaim_config import ReclaimConfig, ReclaimMode, ReclaimState, changed
from hvaqemu.units import MiB, format_rate, format_share

VM = "name: one\nmemory: 512M\n"


def load(folder: Path, text: str) -> ReclaimConfig:
    path = folder / "vm.yaml"
    path.write_text(VM + text)
    return load_vm(path).reclaim


def test_someone_has_to_say_reclaim_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert config == ReclaimConfig()
    assert (config.mode, config.states) == (ReclaimMode.MANUAL, (ReclaimState.UNUSED, ReclaimState.VOLATILE))
    assert (config.min_resident, config.refault_budget, config.cpu_limit, config.shares) == (64 * MiB, 0.002, 0.05, 100)


@pytest.mark.parametrize("mode", ["off", "manual", "proactive", "pressure"])
def test_modes_without_a_target(tmp_path: Path, mode: str) -> None:
    """`off` without quotes is a truth value to YAML 1.1; here it is a mode."""
    assert load(tmp_path, f"reclaim: {{mode: {mode}}}\n").mode == mode


def test_all_keys(tmp_path: Path) -> None:
    text = (
        "reclaim: {mode: target, states: [stable], min_resident: 32M, target: 100M, refault_budget: 6%/h,"
        " cpu_limit: 0.5%, shares: 7}\n"
    )
    config = load(tmp_path, text)
    assert (config.mode, config.states, config.shares) == (ReclaimMode.TARGET, (ReclaimState.STABLE,), 7)
    assert (config.min_resident, config.target) == (32 * MiB, 100 * MiB)
    assert (config.refault_budget, config.cpu_limit) == (0.001, 0.005)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("reclaim:\n  mode: often\n", "4: key reclaim.mode: input should be 'off', 'manual', 'proactive', 'pressure'"),
        ("reclaim:\n  mode: target\n", "3: key reclaim: is missing: mode target needs the bytes of backing and store"),
        ("reclaim:\n  target: 1G\n", "4: key reclaim.target: means nothing in mode manual; only with mode: target"),
        ("reclaim: {mode: target, target: 1M}\n", "3: key reclaim.target: 1.0 MiB is less than min_resident, 64.0 MiB"),
        ("reclaim: {states: []}\n", "3: key reclaim.states: name each state once, at least one of unused, volatile"),
        ("reclaim: {states: [unused, unused]}\n", "3: key reclaim.states: name each state once"),
        ("reclaim: {refault_budget: 0.2}\n", "3: key reclaim.refault_budget: write a rate with its % and time"),
        ("reclaim: {refault_budget: 0.2%}\n", "3: key reclaim.refault_budget: '0.2%' is not a rate"),
        ("reclaim: {cpu_limit: 5}\n", "3: key reclaim.cpu_limit: write a share with its %, for example 5%"),
        ("reclaim: {cpu_limit: 0%}\n", "3: key reclaim.cpu_limit: input should be greater than 0"),
        ("reclaim: {cpu_limit: 200%}\n", "3: key reclaim.cpu_limit: input should be less than or equal to 1"),
        ("reclaim: {shares: 0}\n", "3: key reclaim.shares: input should be greater than or equal to 1"),
        ("reclaim: {budget: 1}\n", "3: key reclaim.budget: is not a known key"),
    ],
)
def test_wrong_keys_are_named_with_their_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path}/vm.yaml:{says}")


_TARGET = ReclaimConfig(mode=ReclaimMode.TARGET, target=128 * MiB)


def test_words_change_what_they_name() -> None:
    config = changed(ReclaimConfig(), ["reclaim.refault_budget=0.5%/min", "mode=proactive"])
    assert config == ReclaimConfig.model_validate({"mode": "proactive", "refault_budget": "0.5%/min"})
    assert changed(config, ["mode=off"]).mode is ReclaimMode.OFF
    assert changed(config, ["mode=target", "target=1G"]).target == 1 << 30


@pytest.mark.parametrize("word", ["states=stable,unused", "states=[stable, unused]"])
def test_states_in_a_word(word: str) -> None:
    assert changed(ReclaimConfig(), [word]).states == (ReclaimState.STABLE, ReclaimState.UNUSED)


def test_a_target_goes_with_its_mode() -> None:
    assert changed(_TARGET, ["mode=manual"]) == ReclaimConfig()
    assert changed(_TARGET, ["shares=1"]).target == 128 * MiB


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mode=often"], "key reclaim.mode: input should be 'off', 'manual'"),
        (["rate=1"], "key reclaim.rate: is not a known key"),
        (["mode"], "'mode' is not key=value (for example reclaim.mode=proactive)"),
        (["=1"], "'=1' is not key=value"),
        (["shares=1", "reclaim.shares=2"], "key reclaim.shares: is given twice"),
        (["shares="], "key reclaim.shares: input should be a valid integer, not nothing"),
        (["mode=["], "key reclaim.mode:1: expected"),
        (["mode=proactive", "target=1G"], "key reclaim.target: means nothing in mode proactive"),
        (["target=1M"], "key reclaim.target: 1.0 MiB is less than min_resident"),
        (["refault_budget=0.5"], "key reclaim.refault_budget: write a rate with its % and time"),
    ],
)
def test_wrong_words(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(_TARGET, words)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


@given(st.floats(0, 1), st.floats(0, 1, exclude_min=True), st.integers(1, 1_000_000))
def test_round_trip_through_json(rate: float, share: float, shares: int) -> None:
    config = ReclaimConfig.model_validate(
        {"refault_budget": format_rate(rate), "cpu_limit": format_share(share), "shares": shares}
    )
    assert (config.refault_budget, config.cpu_limit) == (rate, share)
    assert ReclaimConfig.model_validate_json(config.model_dump_json()) == config
    assert changed(config, []) == config
