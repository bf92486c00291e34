"""The loads of a scenario: begun beside its steps, ended, and held against what is expected of them."""

from __future__ import annotations

from collections.abc import Iterator

from hva_host.load.model import LoadOrder, LoadResult
from hva_host.load.process import LoadProcess
from hvaqemu.bounds import Bounds
from hvaqemu.config import VmConfig
from hvaqemu.load_config import LoadExpectation, LoadPlan, paths
from hvaqemu.network_config import service_address
from hvaqemu.units import format_duration, format_frequency

#: Key, its bounds, the load's figure, and that of the load it is compared with.
_Figure = tuple[str, Bounds, float, float | None]


class Loads:
    """Loads on one VM, one at a time."""

    def __init__(self, vm: VmConfig) -> None:
        self._vm = vm
        self._name = ""
        self._load: LoadProcess | None = None
        #: What paths have had for an answer, whatever was done to the guest in between.
        self._known: dict[str, str] = {}
        self.results: dict[str, LoadResult] = {}

    async def begin(self, plan: LoadPlan) -> None:
        """Begin once the service answers.

        :raise HvaError: it does not, or the load can not be begun.
        """
        host, port = service_address(self._vm.network, plan.port)
        order = LoadOrder(
            host=host,
            port=port,
            paths=[path for url in plan.url for path in paths(url)],
            rate=plan.rate,
            timeout=plan.timeout,
            ready=plan.ready,
            known=self._known,
        )
        self._load = await LoadProcess.start(order)
        self._name = plan.save

    async def end(self) -> LoadResult:
        """End what :meth:`begin` began.

        :raise HvaError: it has ended before.
        """
        load, self._load = self._load, None
        assert load is not None
        report = await load.stop()
        self._known = report.known
        self.results[self._name] = report.result
        return report.result

    async def kill(self) -> None:
        """End what is under way, whatever it is at."""
        load, self._load = self._load, None
        if load is not None:
            await load.kill()

    def found(self, expectation: LoadExpectation) -> list[str]:
        """What is bounded, in a few words each."""
        return [f"{key} {bounds.found(value, other)}" for key, bounds, value, other in self._figures(expectation)]

    def violations(self, expectation: LoadExpectation) -> Iterator[str]:
        """What an expectation finds wrong, each a phrase."""
        result = self.results[expectation.load]
        if result.failed > expectation.errors:
            kinds = ", ".join(f"{count:,} x {error}" for error, count in sorted(result.errors.items()))
            yield f"{result.failed:,} of {result.requests:,} requests failed: {kinds}"
        for key, bounds, value, other in self._figures(expectation):
            for violation in bounds.violations(value, other):
                yield f"{key} {violation}"

    def _figures(self, expectation: LoadExpectation) -> Iterator[_Figure]:
        for key, bounds in expectation.bounds():
            other = self.results[bounds.of].figure(key) if bounds.of is not None else None
            yield key, bounds, self.results[expectation.load].figure(key), other


def shown(result: LoadResult) -> str:
    """What came of a load, in a few words."""
    failed = f", {result.failed:,} failed" if result.failed else ""
    latencies = ", ".join(
        f"{name} {format_duration(value)}"
        for name, value in (("p50", result.p50_s), ("p99", result.p99_s), ("p99.9", result.p999_s))
    )
    return f"{result.right:,} right answers, {format_frequency(result.throughput)}{failed}, {latencies}"
