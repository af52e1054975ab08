"""What was asked for on the command line, and what was found so far."""

from __future__ import annotations

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
    """Every target by itself: what all else is compared with."""

    asks: Sequence[Ask]
    """The targets, each second turn behind its first one's answer."""
    answers: Answers
    digest: str
    """Of all tokens and logprob bits."""
    model: types_pb2.Model


@dataclass
class Plan:
    """One model in one set-up."""

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
    """Whether EXACT is asked through one."""
    deadline: float = float("inf")
    """By time.monotonic; nothing new is begun after it."""
    bad: list[str] = field(default_factory=list)
    """What is not as it should be."""
    lines: list[str] = field(default_factory=list)
    """The table."""
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    """Tokens a second: by who makes them, and cell."""
    reference: Reference | None = None

    def anew(self, *flags: str) -> Plan:
        """The same with more flags, and nothing found."""
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
        """What goes wrong in it is told, and ends it alone; so is how long it took."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001  # the other parts are worth having
            self.bad.append(f"{title}: {why(error)}")
            say(f"   {self.bad[-1]}")
        self.lines.append(f"seconds  {title}: {time.monotonic() - began:.0f}")


def why(error: Exception) -> str:
    """What went wrong, on one line: of a program that ended, the last thing it said."""
    text = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if '"ERROR"' in line or "Error: " in line), lines[-1] if lines else "")
    return f"{type(error).__name__}: {told[-400:]}"


def numbers(text: str) -> tuple[int, ...]:
    """Of a flag: "1,8,64"."""
    return tuple(map(int, names(text)))


def names(text: str) -> tuple[str, ...]:
    """Likewise: "exact, stock"."""
    return tuple(stripped for part in text.split(",") if (stripped := part.strip()))


def say(text: str) -> None:
    print(text, flush=True)
