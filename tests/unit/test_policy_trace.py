"""Looks as JSON lines, and deciding on them again."""

from __future__ import annotations

import pytest

from hva_host.policy import trace
from hva_host.policy.samples import Cgroup, HostSample
from hvaqemu.errors import ConfigError
from hvaqemu.units import GiB
from tests.policy.model import Host, play, typical
from tests.unit.policy_samples import config, limits

ALLOWED = limits({"a": config(mode="proactive")})


class _Bound(Host):
    def sample(self, *arguments: object) -> HostSample:
        seen = super().sample(*arguments)  # type: ignore[arg-type]
        return HostSample(seen.at_s, seen.total_bytes, seen.available_bytes, cgroup=Cgroup(GiB, GiB // 2))


def test_what_is_decided_on_a_trace_is_what_was_decided() -> None:
    moments = list(play([typical("a")], ALLOWED, 400, _Bound(8 * GiB)))
    lines = [trace.header(), *(trace.dump(each.now, each.look) for each in moments)]
    assert not any("\n" in line for line in lines)
    looks = list(trace.load(lines, "trace"))
    assert [each.look for each in looks] == [each.look for each in moments]
    again = [decisions for _, decisions in trace.replay(looks, ALLOWED)]
    assert again == [each.decisions for each in moments]
    assert any(each.steps for each in again)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{}"], "trace:1: is not a trace of version 1"),
        (["nothing"], "trace:1: is not JSON"),
        ([trace.header(), "{}"], "trace:2: now: Field required"),
        ([trace.header(), '{"now": 1, "look": {"host": null, "vms": [{}]}}'], "trace:2: look.vms.0.name: Field"),
        ([trace.header(), "{"], "trace:2: look: Invalid JSON"),
    ],
)
def test_a_line_that_is_none_is_named(lines: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(trace.load(lines, "trace"))
    assert str(caught.value).startswith(says)
