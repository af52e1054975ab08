"""What tests of second runs share: a pair whose engine diverges where its script says, and what is said of it afterwards."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from ostinato.client import Client
from ostinato.v1 import sequencer_pb2, types_pb2

from tests.e2e.conftest import Door, opened
from tests.pair import Pair


def rule(do: str, at: int, *purposes: str, **more: Any) -> dict[str, Any]:
    """Of the scripted engine."""
    return {"do": do, "at": at, "purposes": purposes or ("PRIMARY",), **more}


def service(*rules: dict[str, Any], **script: Any) -> list[str]:
    """Its flags."""
    return ["--self-test", "off", "--script", json.dumps({"rules": rules, **script})]


@contextlib.asynccontextmanager
async def paired(*sidecar: str, rules: Iterable[dict[str, Any]] = (), **script: Any) -> AsyncIterator[Door]:
    """A connected pair for one test alone."""
    with Pair(service=service(*rules, **script), sidecar=sidecar) as pair:
        pair.start()
        async with opened(pair) as door:
            yield door


@dataclass(frozen=True)
class Audited:
    """An AUDITED entry."""

    index: int
    sequence: int
    verdict: str
    said: sequencer_pb2.AuditedPayload


async def audited(client: Client, kind: str) -> list[Audited]:
    """Those of this kind, in order."""
    wanted = types_pb2.ComparisonKind.Value(f"COMPARISON_KIND_{kind.upper()}")
    found = []
    async for entry in client.tail(payloads=True):
        if entry.header.kind == types_pb2.ENTRY_KIND_AUDITED:
            said = sequencer_pb2.AuditedPayload.FromString(entry.payload)
            if said.comparison.kind == wanted:
                verdict = types_pb2.Verdict.Name(said.comparison.verdict).removeprefix("VERDICT_").lower()
                found.append(Audited(entry.header.index, entry.header.sequence, verdict, said))
    return found


def counted(pair: Pair, kind: str) -> Counter[str]:
    """Verdicts of this kind in the metrics, whatever the grade."""
    found: Counter[str] = Counter()
    for name, value in pair.metrics().items():
        if name.startswith("ostinato_comparisons_total{") and f'kind="{kind}"' in name:
            found[name.split('verdict="')[1].split('"')[0]] += int(value)
    return found


def missing(pair: Pair, kind: str) -> dict[str, int]:
    """Second runs of this kind that brought no verdict, by reason."""
    prefix = f'ostinato_not_compared_total{{kind="{kind}",reason="'
    return {
        name.removeprefix(prefix).removesuffix('"}'): int(value)
        for name, value in pair.metrics().items()
        if name.startswith(prefix)
    }
