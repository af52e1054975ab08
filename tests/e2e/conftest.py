"""A pair for all tests that leave it as it was, and logs behind a failure."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator

import pytest

from tests.e2e.kit import SLOWLY, Door, Tenants, opened, scripted
from tests.pair import Pair, running_pair


@pytest.fixture(scope="session", name="pair")
def _pair() -> Iterator[Pair]:
    """One for all that leave it as it was; its engine takes its time."""
    with running_pair(service=scripted(**SLOWLY)) as shared:
        yield shared


@pytest.fixture(name="door")
async def _door(pair: Pair) -> AsyncIterator[Door]:
    async with opened(pair) as door:
        yield door


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Behind a failure, what the programs logged."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        pairs = {
            each if isinstance(each, Pair) else each.pair
            for each in item.funcargs.values()
            if isinstance(each, Door | Pair | Tenants)
        }
        for program in (program for pair in pairs for program in pair.programs):
            report.sections.append(
                (f"log of {program.name} {program.pid}", "\n".join(line[:400] for line in program.lines[-20:]))
            )
    return report
