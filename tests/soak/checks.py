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

from tests.sidecar.journal_kit import verify_journal
from tests.soak.load import Call, Job
from tests.soak.recording import Submission

COMPLETED, ABANDONED = types_pb2.ENTRY_KIND_COMPLETED, types_pb2.ENTRY_KIND_ABANDONED


@dataclass(slots=True)
class Record:
    """The journal, as Tail tells it."""

    entries: int = 0
    opened: int = 0
    faults: list[str] = field(default_factory=list)
    """Of the chain."""
    admitted: dict[int, types_pb2.EntryHeader] = field(default_factory=dict)
    given: dict[int, sequencer_pb2.AdmittedPayload] = field(default_factory=dict)
    outcomes: dict[int, types_pb2.EntryHeader] = field(default_factory=dict)
    outputs: dict[int, bytes] = field(default_factory=dict)
    """Their digests, of what completed."""
    last: sequencer_pb2.Entry | None = None

    async def read(self, client: Client) -> Record:
        """Take in what is new."""
        first = self.last.header.index + 1 if self.last is not None else 1
        async for entry in client.tail(first, payloads=True, timeout=120):
            self.take(entry)
        return self

    def take(self, entry: sequencer_pb2.Entry) -> None:
        """The next one."""
        header = entry.header
        self.faults += [f"entry {header.index}: {fault}" for fault in chain.check_link(self.last, entry)]
        self.last, self.entries = entry, self.entries + 1
        if header.kind == types_pb2.ENTRY_KIND_OPENED:
            self.opened += 1
        elif header.kind == types_pb2.ENTRY_KIND_ADMITTED:
            self.admitted[header.sequence] = header
            self.given[header.sequence] = sequencer_pb2.AdmittedPayload.FromString(entry.payload)
        elif header.kind in chain.OUTCOMES:
            if header.sequence in self.outcomes:
                self.faults.append(f"sequence {header.sequence} has two outcomes")
            self.outcomes[header.sequence] = header
            if header.kind == COMPLETED:
                output = sequencer_pb2.CompletedPayload.FromString(entry.payload).output
                self.outputs[header.sequence] = output_digest(output)

    def input(self, sequence: int) -> bytes:
        """The input's digest."""
        given = self.given[sequence]
        return input_digest(given.token_ids, given.parameters, given.seed)

    def by_request(self, since: int) -> dict[str, list[types_pb2.EntryHeader]]:
        """The ADMITTED headers of every request_id, ascending, from a sequence on."""
        found = defaultdict[str, list[types_pb2.EntryHeader]](list)
        for sequence, header in self.admitted.items():
            if sequence >= since:
                found[self.given[sequence].request_id].append(header)
        return found


def numbers(record: Record) -> list[str]:
    """1 to n without a gap, in batches that stand together, every one ended."""
    faults = list(record.faults)
    if list(record.admitted) != list(range(1, len(record.admitted) + 1)):
        faults.append("the sequences are not 1 to n")
    for sequence, header in record.admitted.items():
        if not header.first_sequence <= sequence < header.first_sequence + header.count:
            faults.append(f"sequence {sequence} is outside its batch")
    return faults + [f"sequence {one} has no outcome" for one in sorted(set(record.admitted) - set(record.outcomes))]


def calls(seen: Sequence[Call], record: Record, since: int = 1) -> list[str]:
    """Every answer is what the journal has, a refusal left nothing in it, and a job with a key has one range. `since`: the
    first sequence that these calls can have got."""
    faults, admitted = [], record.by_request(since)
    for call in seen:
        where = f"call {call.request_id}"
        faults += [f"{where}: {fault}" for fault in call.faults]
        own = admitted.get(call.request_id, [])
        if call.refused and own:
            faults.append(f"{where}: was refused ({call.error}), and has sequence {own[0].sequence}")
        if own and len(own) != len(call.job.request.items):
            faults.append(f"{where}: was admitted {len(own)} items for {len(call.job.request.items)}")
        if call.stamp is not None:
            faults += [f"{where}: {fault}" for fault in _stamp(call.stamp, record)]
            if own and own[0].first_sequence != call.stamp.first_sequence:
                faults.append(f"{where}: was told {call.stamp.first_sequence}, the journal says {own[0].first_sequence}")
            if not own and not call.job.keyed:
                faults.append(f"{where}: has a stamp, and nothing in the journal")
    unknown = set(admitted) - {call.request_id for call in seen}
    return faults + [f"call {one}: is of no client" for one in sorted(unknown)] + _keys(seen, admitted)


def _stamp(stamp: types_pb2.Stamp, record: Record) -> list[str]:
    header = record.admitted.get(stamp.first_sequence)
    if header is None:
        return [f"sequence {stamp.first_sequence} was acknowledged, and is lost"]
    claims = (
        ("log_id", stamp.log_id, header.log_id),
        ("writer", stamp.writer, header.writer),
        ("epoch", stamp.epoch, header.epoch),
        ("count", stamp.count, header.count),
        ("first_sequence", stamp.first_sequence, header.first_sequence),
    )
    return [f"stamp.{name}: {told}, the journal says {kept}" for name, told, kept in claims if told != kept]


def _keys(seen: Sequence[Call], admitted: dict[str, list[types_pb2.EntryHeader]]) -> list[str]:
    ranges, entered = defaultdict[Job, set[int]](set), defaultdict[Job, int](int)
    for call in seen:
        if call.job.keyed and call.stamp is not None:
            ranges[call.job].add(call.stamp.first_sequence)
        entered[call.job] += call.request_id in admitted
    faults = [
        f"job {job.number}: one key, and the numbers {sorted(firsts)}" for job, firsts in ranges.items() if len(firsts) > 1
    ]
    return faults + [
        f"job {job.number}: was admitted {count} times" for job, count in entered.items() if job.keyed and count > 1
    ]


def real_time(seen: Sequence[Call]) -> list[str]:
    """What was acknowledged before another job was first sent has the smaller number."""
    first, known = dict[Job, Call](), dict[Job, tuple[float, int]]()
    for call in seen:
        first.setdefault(call.job, call)
        if call.stamp is not None and call.acknowledged_at < known.get(call.job, (float("inf"), 0))[0]:
            known[call.job] = call.acknowledged_at, call.stamp.first_sequence
    sent = sorted((first[job].sent_at, number) for job, (_, number) in known.items())
    acknowledged = sorted(known.values())
    faults, highest, position = [], 0, 0
    for sent_at, number in sent:
        while position < len(acknowledged) and acknowledged[position][0] < sent_at:
            highest = max(highest, acknowledged[position][1])
            position += 1
        if number <= highest:
            faults.append(f"sequence {number} was sent after {highest} had been acknowledged")
    return faults


def results(seen: Iterable[Call]) -> list[str]:
    """Every answer is whole, in order, and proved by its receipt; what was streamed is its output."""
    faults = []
    for call in seen:
        if not call.results:
            continue
        assert call.stamp is not None, "results come with a stamp"
        expected = list(range(call.stamp.first_sequence, call.stamp.first_sequence + call.stamp.count))
        got = [result.sequence for result in call.results]
        if (sorted(got) if call.job.streamed or call.error is not None else got) != expected[: len(got)] and call.complete:
            faults.append(f"call {call.request_id}: has results {got} instead of {expected}")
        for result in call.results:
            faults += [f"sequence {result.sequence}: {fault}" for fault in _result(result, call)]
    return faults


def _result(result: types_pb2.Result, call: Call) -> list[str]:
    if not result.HasField("output"):
        return [] if result.HasField("status") else ["has neither output nor status"]
    faults = chain.check_result(result)
    if call.job.streamed:
        ids, output = call.streamed.get(result.sequence, []), list(result.output.token_ids)
        # A stream that joins a run which was not streamed gets its end only.
        if ids != (output[: len(ids)] if call.repeated else output):
            faults.append(f"{ids} was streamed, {output} came out")
        text = call.texts.get(result.sequence, "")
        if not (result.output.text.startswith(text) if call.repeated else result.output.text == text):
            faults.append(f"{text!r} was streamed, {result.output.text!r} came out")
    return faults


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
    """Everything completed, but what had no key and lost its caller may have been abandoned."""
    lost = {call.request_id for call in seen if call.error is not None and not call.refused and not call.job.keyed}
    faults = []
    for sequence, outcome in record.outcomes.items():
        given = record.given.get(sequence)
        if given is None or sequence < since:
            continue
        may = {COMPLETED, ABANDONED} if given.request_id in lost and not given.idempotency_key else {COMPLETED}
        if outcome.kind not in may:
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
    return [fault for checked in verify_journal(path) for fault in checked.faults]
