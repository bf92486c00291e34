from __future__ import annotations

import inspect
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hva_host.agent import control_wire as wire
from hvaqemu import errors
from hvaqemu.errors import ConfigError, HostError, HvaError, ProtocolError
from hvaqemu.qemu.qmp import QmpError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), values, max_size=4)


@given(st.lists(st.tuples(objects, st.sampled_from(["", "\n", "\r\n", "  \t"]), st.booleans())), st.data())
def test_objects_come_out_whole_however_the_stream_is_cut(
    sent: list[tuple[dict[str, object], str, bool]], data: st.DataObject
) -> None:
    stream = b"".join(
        json.dumps(value, ensure_ascii=ascii, indent=1 if ascii else None).encode() + gap.encode()
        for value, gap, ascii in sent
    )
    splitter = wire.Splitter()
    got: list[bytes] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += splitter.feed(stream[:size])
        stream = stream[size:]
    assert [json.loads(piece) for piece in got] == [value for value, _, _ in sent]


def test_backslashes_that_come_one_by_one() -> None:
    splitter, sent = wire.Splitter(), {"\\": '\\"\\\\', '"': "\\"}
    stream = json.dumps(sent).encode()
    got = [piece for at in range(len(stream)) for piece in splitter.feed(stream[at : at + 1])]
    assert [json.loads(piece) for piece in got] == [sent]


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_arbitrary_bytes_never_grow_the_buffer_and_never_crash(pieces: list[bytes]) -> None:
    splitter = wire.Splitter(limit=64)
    try:
        for piece in pieces:
            for message in splitter.feed(piece):
                assert 0 < len(message) <= 64
            assert len(splitter._buffer) <= 64
    except ProtocolError:
        pass


@pytest.mark.parametrize("broken", [b"nonsense\n", b'{"a": "unclosed\n', b"]]\n", b"[1, 2]\n", b'"text"\n'])
def test_what_follows_garbage_is_understood(broken: bytes) -> None:
    first, second = wire.Splitter().feed(broken + b'{"execute": "x"}')
    with pytest.raises(ProtocolError):
        wire.decode(first)
    assert wire.decode(second) == {"execute": "x"}


def test_a_message_beyond_the_limit_ends_the_stream() -> None:
    splitter = wire.Splitter(limit=100)
    assert list(splitter.feed(b'{"a":"' + b"x" * 90)) == []
    with pytest.raises(ProtocolError, match="100 bytes"):
        list(splitter.feed(b"x" * 10))


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    with pytest.raises(ProtocolError):
        wire.decode(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@pytest.mark.parametrize(
    "kind", [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, HvaError)]
)
def test_errors_arrive_as_what_they_were(kind: type[HvaError]) -> None:
    for hint in ("", "do this"):
        sent = wire.error_to_wire(kind("what is wrong", hint))
        got = wire.error_from_wire(sent["class"], sent["desc"], sent.get("hint", ""))
        assert type(got) is kind
        assert (got.message, got.hint) == ("what is wrong", hint)


def test_errors_below_the_common_tree_arrive_as_their_nearest_relative() -> None:
    class Special(HostError):
        pass

    assert wire.error_to_wire(Special("no room"))["class"] == "HostError"
    assert wire.error_to_wire(QmpError("balloon", "DeviceNotActive", "no balloon"))["class"] == "HvaError"


@pytest.mark.parametrize("name", ["GenericError", "annotations", "Exception", "__doc__"])
def test_unknown_error_classes_do_not_name_things_of_ours(name: str) -> None:
    got = wire.error_from_wire(name, "text", "")
    assert type(got) is ProtocolError
    assert not isinstance(got, ConfigError)
