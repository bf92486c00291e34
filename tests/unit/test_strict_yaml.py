"""Strict YAML: what is accepted, and that every complaint is one line naming file, line and key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator

from hvaqemu.errors import ConfigError
from hvaqemu.strict_yaml import SIZE_MAX, load, loads


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Disk(Strict):
    path: str
    read_only: bool = False


class Vm(Strict):
    name: str
    accelerator: Literal["tcg", "kvm", "off"] = "tcg"
    cpus: int = Field(default=1, ge=1)
    disks: list[Disk] = []
    memory: str = "1G"

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str) -> str:
        if not value.endswith(("M", "G")):
            raise ValueError(f"{value!r} is not a size; write for example 512M")
        return value


class Top(Strict):
    vm: Vm


class Anything(RootModel[dict[str, Any]]):
    pass


def complaint(text: str, model: type[BaseModel] = Top) -> str:
    with pytest.raises(ConfigError) as caught:
        loads(text, "file.yaml", model)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("file.yaml")
    return message


def anything(text: str) -> dict[str, Any]:
    return loads(text, "file.yaml", Anything).root


def test_a_good_file_becomes_the_model(tmp_path: Path) -> None:
    file = tmp_path / "vm.yaml"
    file.write_text(
        "vm:\n  name: a\n  accelerator: off   # text, not a truth value\n  disks: [{path: /x, read_only: true}]\n"
    )
    assert load(file, Top) == Top(vm=Vm(name="a", accelerator="off", disks=[Disk(path="/x", read_only=True)]))


def test_flow_style_is_read() -> None:
    assert loads("{vm: {name: mine, memory: 2G}}", "file.yaml", Top).vm.memory == "2G"


@pytest.mark.parametrize(
    "word", ["on", "off", "yes", "no", "y", "n", "On", "1:30", "2020-01-01", "0b1", "1_000", ".inf"]
)
def test_surprising_words_stay_text(word: str) -> None:
    assert anything(f"k: {word}")["k"] == word


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("false", False), ("~", None), ("", None), ("10", 10), ("010", 10), ("0x1f", 31), ("0o17", 15),
     ("1.5", 1.5), ("1e3", 1000.0), ("'1'", "1"), ('"true"', "true"), ("512M", "512M"), ("1e999", "1e999"),
     ("!!str 5", "5")],
)  # fmt: skip
def test_plain_scalars(text: str, value: object) -> None:
    got = anything(f"k: {text}")["k"]
    assert got == value
    assert type(got) is type(value)


def test_unknown_key_is_named_with_its_line() -> None:
    assert complaint("vm:\n  name: a\n  memry: 1G\n") == "file.yaml:3: key vm.memry: is not a known key"


def test_unknown_key_comes_before_the_missing_one() -> None:
    message = complaint("vm:\n  cpus: 2\n  nmae: a\n")
    assert message == "file.yaml:3: key vm.nmae: is not a known key (and 1 more)"


def test_unknown_key_in_a_list() -> None:
    message = complaint("vm:\n  name: a\n  disks:\n    - path: /x\n    - path: /y\n      readonly: true\n")
    assert message == "file.yaml:6: key vm.disks[1].readonly: is not a known key"


def test_missing_key_names_the_line_of_what_lacks_it() -> None:
    assert complaint("\nvm:\n  cpus: 2\n") == "file.yaml:2: key vm.name: is missing"


def test_bad_values() -> None:
    assert complaint("vm:\n  name: a\n  cpus: 0\n").startswith("file.yaml:3: key vm.cpus: input should be greater than")
    assert complaint("vm:\n  name: a\n  memory: lots\n").endswith("'lots' is not a size; write for example 512M")
    assert complaint("vm:\n  name: [1, 2]\n") == "file.yaml:2: key vm.name: input should be a valid string, not a list"


def test_union_members_do_not_show_in_the_key() -> None:
    class One(Strict):
        one: int

    class Two(Strict):
        two: int

    class Steps(Strict):
        steps: list[Annotated[One | Two, Field()]]

    assert complaint("steps:\n  - one: 1\n  - three: 3\n", Steps).startswith(
        "file.yaml:3: key steps[1].three: is not a known"
    )


def test_duplicate_key() -> None:
    assert complaint("vm:\n  name: a\n  name: b\n") == "file.yaml:3: key vm.name: appears twice, first on line 2"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("vm: [", 1),
        ("vm:\n\tname: a", 2),
        ("a: b: c", 1),
        ("vm: *nowhere", 1),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: \x07", 1),
    ],
)
def test_syntax_errors_name_the_line(text: str, line: int) -> None:
    assert complaint(text).startswith(f"file.yaml:{line}: ")


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system [ls]", "!own {}", "k: !own 1", "k: !own [1]", "{[1]: 2}"]
)
def test_tags_and_odd_keys_are_refused(text: str) -> None:
    complaint(text)


@pytest.mark.parametrize("text", ["- a", "word", "5"])
def test_top_must_be_keys(text: str) -> None:
    assert "must hold keys and values" in complaint(text)


def test_empty_file_is_an_empty_mapping() -> None:
    assert complaint("# nothing\n") == "file.yaml:1: key vm: is missing"


def test_merge_key_is_no_magic() -> None:
    assert "<<" in complaint("vm: &x\n  name: a\n  <<: {cpus: 2}\n")


def test_alias_bomb_is_bounded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "aliases expanded" in complaint("\n".join(lines))


def test_alias_to_itself_and_deep_nesting_end() -> None:
    assert "nested deeper" in complaint("a: &a [*a]")
    assert "nested deeper" in complaint("a: " + "[" * 200 + "]" * 200)
    assert "nested deeper" in complaint("a: " + "[" * 20000 + "]" * 20000)


def test_unreadable_files(tmp_path: Path) -> None:
    for name, content, expected in (
        ("big", b"#" * (SIZE_MAX + 1), "longer"),
        ("latin", b"a: 1\nb: \xe9\n", ":2: is not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=expected):
            load(tmp_path / name, Top)
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "missing.yaml", Top)
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path, Top)


@given(st.text(max_size=200))
def test_arbitrary_text_is_data_or_one_line(text: str) -> None:
    try:
        anything(text)
    except ConfigError as error:
        assert "\n" not in str(error)


def _is_a_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# U+0085 is a line break to YAML 1.1, which PyYAML writes; and numbers without a point, as 0E0, are texts to it.
_text = st.text(st.characters(exclude_characters="\x85", exclude_categories=["Cs"]), max_size=12).filter(
    lambda text: not _is_a_number(text)
)
_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | _text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_text, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(_text, _plain, max_size=5))
def test_what_yaml_dumps_comes_back(data: dict[str, Any]) -> None:
    assert anything(yaml.safe_dump(data, allow_unicode=True)) == data
