"""What the command line asks for, and what was found so far."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio

from ostinato.v1 import types_pb2

from tests.gpu.fronts import Answers
from tests.gpu.traffic import NEW_TOKENS, Ask, plain, targets


@dataclass(frozen=True, slots=True)
class Reference:
    """The answers of every target alone, with which all others are compared."""

    asks: Sequence[Ask]
    """The targets; each second turn contains the answer of its first."""
    answers: Answers
    digest: str
    """Digest of all tokens and logprob bits."""
    model: types_pb2.Model


@dataclass
class Plan:
    """One model with one set of flags."""

    model: Path
    state: Path
    flags: tuple[str, ...] = ()
    """Of the service."""
    engine: str = "turbomind"
    targets: int = 64
    new_tokens: int = NEW_TOKENS
    totals: tuple[int, ...] = (64, 128, 256)
    trials: int = 3
    batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    sidecar: bool = True
    """Whether the part `exact` uses a sidecar."""
    deadline: float = float("inf")
    """By time.monotonic. Nothing new is started after it."""
    bad: list[str] = field(default_factory=list)
    """What is wrong."""
    lines: list[str] = field(default_factory=list)
    """The table."""
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    """Tokens per second, by producer and cell."""
    reference: Reference | None = None

    def anew(self, *flags: str) -> Plan:
        """A copy with more flags and without results."""
        return replace(self, flags=(*self.flags, *flags), bad=[], lines=[], rates={}, reference=None)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def asks(self, context_tokens: int) -> list[Ask]:
        """The targets, as far as the engine can serve them."""
        asks = targets(self.targets, new_tokens=self.new_tokens, context_tokens=context_tokens)
        return plain(asks) if self.engine == "scripted" else asks

    def tell(self, line: str) -> None:
        """Of the table."""
        self.lines.append(line)
        say(f"   {line}")

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """Records the duration of a part, and an error of it, which does not end the other parts."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001  # the other parts are worth having
            self.bad.append(f"{title}: {why(error)}")
            say(f"   {self.bad[-1]}")
        self.lines.append(f"seconds  {title}: {time.monotonic() - began:.0f}")


def why(error: Exception) -> str:
    """An error on one line. Of a program that ended, its last message."""
    text = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if '"ERROR"' in line or "Error: " in line), lines[-1] if lines else "")
    return f"{type(error).__name__}: {told[-400:]}"


def numbers(text: str) -> tuple[int, ...]:
    """The value of a flag such as "1,8,64"."""
    return tuple(map(int, names(text)))


def names(text: str) -> tuple[str, ...]:
    """The value of a flag such as "exact, stock"."""
    return tuple(stripped for part in text.split(",") if (stripped := part.strip()))


def say(text: str) -> None:
    print(text, flush=True)


def arguments(program: str) -> argparse.ArgumentParser:
    """Those that all checks have."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("model", type=Path)
    parser.add_argument("--targets", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--totals", type=numbers, default=(64, 256))
    parser.add_argument("--seconds", type=float, default=500.0, help="begin nothing new after so long")
    parser.add_argument("--state", type=Path, help="kept from call to call; else a new one")
    parser.add_argument("--engine", default="turbomind", help="another one, to try the check itself")
    parser.add_argument("--flags", default="", help="more flags of the service, in one text")
    return parser


def plan_of(given: argparse.Namespace, state: str) -> Plan:
    return Plan(
        model=given.model.resolve(),
        state=given.state or Path(state),
        flags=tuple(shlex.split(given.flags)),
        engine=given.engine,
        targets=given.targets,
        new_tokens=given.new_tokens,
        totals=given.totals,
        deadline=time.monotonic() + given.seconds,
    )


def conclude(began: float, *plans: Plan) -> int:
    """Prints the tables and returns the exit code."""
    for plan in plans:
        say(f"\n==== {plan.model.name} {' '.join(plan.flags)}")
        for line in (*plan.lines, *(f"BAD      {text}" for text in plan.bad)):
            say(line)
    bad = sum(len(plan.bad) for plan in plans)
    say(f"{bad} not as they should be" if bad else "all as it should be")
    say(f"seconds  in all: {time.monotonic() - began:.0f}")
    return 1 if bad else 0
