"""Accounts for tests of calls."""

from __future__ import annotations

from contextlib import ExitStack

from sidecar.held import Account, Bounds, Held

LARGE = 1 << 40


def held(call: int = LARGE, tenant: int = LARGE, everything: int = LARGE) -> tuple[Held, list[str]]:
    """With these bounds, in bytes; and the bounds that calls were lost to."""
    lost: list[str] = []
    return Held(Bounds(call, tenant, everything), lost.append), lost


_OPEN = ExitStack()
"""What tests of calls use until they end: an account is closed with its call."""


def account(call: int = LARGE) -> Account:
    """Of a stream with this bound on what waits."""
    return _OPEN.enter_context(held(call)[0].account(stream=True))
