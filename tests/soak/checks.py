"""What must hold for a load, whatever happened to the programs under it. Each check returns its faults, one line each."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ostinato import chain
from ostinato.client import Client
from ostinato.digest import input_digest, output_digest
from ostinato.v1 import sequencer_pb2, types_pb2

from sidecar.journal.model import Sealed
from tests.sidecar.journal_kit import faults as faults_of
from tests.simulation import promises
from tests.simulation.history import Call
from tests.soak.load import Load
from tests.soak.recording import Submission

COMPLETED, ABANDONED = types_pb2.ENTRY_KIND_COMPLETED, types_pb2.ENTRY_KIND_ABANDONED


@dataclass(slots=True)
class Record:
    """The journal, as Tail tells it."""

    entries: list[Sealed] = field(default_factory=list)
    opened: int = 0
    admitted: dict[int, types_pb2.EntryHeader] = field(default_factory=dict)
    given: dict[int, sequencer_pb2.AdmittedPayload] = field(default_factory=dict)
    outcomes: dict[int, types_pb2.EntryHeader] = field(default_factory=dict)
    outputs: dict[int, bytes] = field(default_factory=dict)
    """Their digests, of what completed."""

    async def read(self, client: Client) -> Record:
        async for entry in client.tail(len(self.entries) + 1, payloads=True, timeout=120):
            self.take(entry)
        return self

    def take(self, entry: sequencer_pb2.Entry) -> None:
        header = entry.header
        previous = self.entries[-1].entry_hash if self.entries else chain.GENESIS
        self.entries.append(Sealed(header, previous, entry.entry_hash, entry.payload))
        if header.kind == types_pb2.ENTRY_KIND_OPENED:
            self.opened += 1
        elif header.kind == types_pb2.ENTRY_KIND_ADMITTED:
            self.admitted[header.sequence] = header
            self.given[header.sequence] = sequencer_pb2.AdmittedPayload.FromString(entry.payload)
        elif header.kind in chain.OUTCOMES:
            self.outcomes[header.sequence] = header
            if header.kind == COMPLETED:
                output = sequencer_pb2.CompletedPayload.FromString(entry.payload).output
                self.outputs[header.sequence] = output_digest(output)

    def input(self, sequence: int) -> bytes:
        given = self.given[sequence]
        return input_digest(given.token_ids, given.parameters, given.seed)


def kept_promises(load: Load, record: Record, since: int = 1) -> list[str]:
    """All promises of docs/order.md, as far as clients and journal show them. `since`: the first sequence that this load can
    have got."""
    load.history.disk = record.entries
    faults = [f"promise {number}: {fault}" for number, all_ in promises.broken(load.history).items() for fault in all_]
    return faults + kinds(load.calls, record, since) + reproduced(record)


def reproduced(record: Record) -> list[str]:
    """Equal inputs under equal fingerprints made equal outputs."""
    made = defaultdict[tuple[bytes, bytes], dict[bytes, int]](dict)
    for sequence in record.outputs.keys() & record.given.keys():
        under = record.input(sequence), record.outcomes[sequence].fingerprint_digest
        made[under].setdefault(record.outputs[sequence], sequence)
    return [f"equal inputs, other outputs: sequences {sorted(each.values())}" for each in made.values() if len(each) > 1]


def submitted(lines: Sequence[Submission], record: Record) -> list[str]:
    """First submissions reached the engine in order of sequence, and what completed is the attempt that ran last."""
    firsts = list(dict.fromkeys(line.sequence for line in lines))
    newest = {line.sequence: line.attempt for line in lines}
    faults = [
        f"sequence {late} reached the engine behind {early}" for early, late in itertools.pairwise(firsts) if late < early
    ]
    for sequence, outcome in record.outcomes.items():
        if outcome.kind == COMPLETED and newest.get(sequence) != outcome.attempt:
            faults.append(f"sequence {sequence}: attempt {outcome.attempt} completed, {newest.get(sequence)} ran last")
    return faults + [f"sequence {one} ran and was never admitted" for one in sorted(set(firsts) - set(record.admitted))]


def kinds(seen: Sequence[Call], record: Record, since: int = 1) -> list[str]:
    """Everything is of a client, and completed; but what had no key and lost its caller may have been abandoned."""
    calls, faults = {call.request.request_id: call for call in seen}, []
    for sequence, given in record.given.items():
        if sequence < since:
            continue
        call = calls.get(given.request_id)
        if call is None:
            faults.append(f"sequence {sequence}: is of no client")
            continue
        may = {COMPLETED} if call.key or call.error is None or call.refused else {COMPLETED, ABANDONED}
        outcome = record.outcomes.get(sequence)
        if outcome is not None and outcome.kind not in may:
            faults.append(f"sequence {sequence}: is {types_pb2.EntryKind.Name(outcome.kind)}")
    return faults


async def kept(seen: Iterable[Call], client: Client, *, most: int = 10**9) -> list[str]:
    """Every result that a client was given is what Get gives, byte for byte; of many, `most` evenly spread ones."""
    given = [(result.sequence, result) for call in seen for result in call.results]
    given = given[:: max(1, -(-len(given) // most))]
    faults, places = [], asyncio.Semaphore(16)

    async def one(sequence: int, result: types_pb2.Result) -> None:
        async with places:
            (record,) = await client.get(sequence, timeout=60)
        if record.result.SerializeToString(deterministic=True) != result.SerializeToString(deterministic=True):
            faults.append(f"sequence {sequence}: Get gives another result than the client was given")
        faults.extend(f"sequence {sequence}: {fault}" for fault in chain.check_record(record))

    await asyncio.gather(*(one(sequence, result) for sequence, result in given))
    return faults


def journal_file(path: Path) -> list[str]:
    """The file verifies, read without a sidecar."""
    return faults_of(path)
