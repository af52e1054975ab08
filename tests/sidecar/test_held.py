"""Bytes held for callers: whose call is lost, and who is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ostinato.errors import QueueFull, SlowReader
from serving.auth import CALLER, Identity, Role

from sidecar.held import COPIES, Account, Held
from tests.sidecar.held_kit import held


class Calls:
    """Of several tenants."""

    def __init__(self, given: Held) -> None:
        self._held, self._open = given, ExitStack()

    def of(self, tenant: str) -> Account:
        """One more, which may wait for long."""
        CALLER.set(Identity(tenant, Role.TENANT))
        return self._open.enter_context(self._held.account(stream=True))

    def close(self) -> None:
        self._open.close()


@pytest.fixture(autouse=True)
def _caller() -> Iterator[None]:
    token = CALLER.set(Identity())
    yield
    CALLER.reset(token)


def lost(*accounts: Account) -> list[bool]:
    return [account.lost.done() for account in accounts]


async def test_a_call_over_its_bound_is_lost() -> None:
    """Exactly the bound may wait, and what is dropped does not count; what is lost frees all that it held."""
    given, bounds = held(call=100)
    calls = Calls(given)
    one, other = calls.of("a"), calls.of("a")
    one.add(100)
    one.add(-50)
    one.add(50)
    other.add(1)
    assert lost(one, other) == [False, False]

    one.add(1)

    assert lost(one, other) == [True, False]
    assert (given.bytes, bounds) == (1, ["call"])
    one.add(1000)
    one.add(-1000)
    assert given.bytes == 1


async def test_the_largest_call_of_a_tenant_is_lost() -> None:
    """Not the one that came last, and none of another tenant's."""
    given, bounds = held(tenant=100)
    calls = Calls(given)
    large, small, other = calls.of("a"), calls.of("a"), calls.of("b")
    other.add(90)
    large.add(70)
    small.add(30)
    assert bounds == []

    small.add(1)

    assert lost(large, small, other) == [True, False, False]
    assert (given.bytes, bounds) == (121, ["tenant"])


async def test_the_largest_tenant_loses_first() -> None:
    """A tenant of many small calls loses before another's one large call does."""
    given, bounds = held(everything=1000)
    calls = Calls(given)
    many = [calls.of("a") for _ in range(60)]
    one = calls.of("b")
    for account in many:
        account.add(10)
    one.add(400)
    assert bounds == []

    one.add(1)

    assert lost(one) == [False]
    assert sum(lost(*many)) == 1
    assert bounds == ["all"]


async def test_what_is_lost_is_told_and_forgotten() -> None:
    """The owner lets go of what waits, and the error says whose bytes were too many and when to come back."""
    given, _ = held(call=100)
    calls = Calls(given)  # kept: its accounts are closed with it
    account = calls.of("a")
    forgotten: list[int] = []
    account.forget = lambda: forgotten.append(account.waiting)

    account.add(101)

    assert forgotten == [0]
    assert isinstance(account.error, SlowReader)
    assert account.error.message == "more than 100 bytes waited to be read by this call"
    assert account.error.retry_after is not None


async def test_who_holds_too_much_is_refused() -> None:
    """What gRPC has counts twice until it is written, and cannot be lost: from half of its bound on the tenant begins nothing
    more, and another does."""
    given, bounds = held(tenant=100, everything=1000)
    CALLER.set(Identity("a", Role.TENANT))
    given.check()
    done = given.writing(25)

    with pytest.raises(QueueFull, match="50 bytes of answers"):
        given.check()
    CALLER.set(Identity("b", Role.TENANT))
    given.check()
    assert (given.bytes, bounds) == (25 * COPIES, [])

    done()

    CALLER.set(Identity("a", Role.TENANT))
    given.check()
    assert given.bytes == 0


async def test_a_tenant_holds_no_more_than_it_leaves() -> None:
    """Two tenants whose answers take two thirds begin nothing more, and a third tenant does, until nothing is left at all."""
    given, _ = held(tenant=1000, everything=900)
    for tenant in "ab":
        CALLER.set(Identity(tenant, Role.TENANT))
        given.check()
        given.writing(150)
        with pytest.raises(QueueFull, match="300 bytes of answers") if tenant == "b" else contextlib.nullcontext():
            given.check()
    CALLER.set(Identity("c", Role.TENANT))
    given.check()

    given.writing(150)

    CALLER.set(Identity("d", Role.TENANT))
    with pytest.raises(QueueFull, match="0 bytes of answers"):
        given.check()


async def test_nothing_stays_of_calls_that_ended() -> None:
    """An account gives back what waits, and a tenant without calls is forgotten."""
    given, _ = held()
    calls = Calls(given)
    for tenant in "abc":
        calls.of(tenant).add(10)
    done = given.writing(5)
    assert given.bytes == 30 + 5 * COPIES

    calls.close()
    done()

    assert given.bytes == 0
    assert given.tenants == 0


async def test_a_call_that_is_over_holds_nothing() -> None:
    """What items say after the end of their call, as where its caller left while it was numbered, is not counted."""
    given, _ = held(call=100)
    with given.account(stream=True) as account:
        account.add(40)
    account.add(40)
    account.add(-10)

    assert given.bytes == 0
