"""`ostinato challenge`: recorded items, chosen at random, are run again at another sidecar, and compared.

Who challenges chooses the seed after the records were handed over. With it anyone can repeat the choice, which is by hash, and
the runs. The records must have what a run needs (token ids, resolved parameters, seed) and what came out: `get --json` and
`tail --json --payloads` print it.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError, Message

from ostinato import chain
from ostinato.cli import documents, show
from ostinato.cli.replay import RESPONSE_BYTES
from ostinato.cli.session import FAILED, UNJUDGED, Session, wrong
from ostinato.digest import tagged_digest, text, u64
from ostinato.replay import CONCURRENCY, Elsewhere, bounded_gather
from ostinato.signature import inclusion_fault
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

COUNT = 16
NOT_CONSISTENT = "not consistent"
VERDICTS = (*show.VERDICTS, NOT_CONSISTENT)


async def challenge(
    session: Session,
    file: Annotated[Path, typer.Argument(help="JSON of get or of tail --payloads; - is stdin.", show_default=False)],
    against: Annotated[str, typer.Option(metavar="TARGET", help="The sidecar that recomputes.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="How many records.")] = COUNT,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="Seed of the choice. Default: a new one.", show_default=False)
    ] = None,
) -> int:
    """Runs recorded items again at another sidecar, chosen at random. Exit code 0: all match; 1: an output differs, or a record
    is not consistent; 3: some could not be compared. Signatures are for `verify`."""
    name, content = documents.content_of(file)
    known = Records()
    for line, value in documents.values(name, content):
        for place, _, message in documents.messages(line, value):
            known.take(place, message)
    if not known.records:
        show.note(f"error: nothing to challenge in {file}: {known.passed_over or 'it has no record'}; get --json has both")
        return FAILED
    seed = secrets.randbits(64) if seed is None else seed
    chosen, verdicts = choice(list(known.records.values()), count, seed), Counter[str]()
    async with session.against(against).client(RESPONSE_BYTES) as client:
        with show.progress("challenge", len(chosen)) as done:
            elsewhere = Elsewhere(client, session.timeout)
            async with aclosing(bounded_gather(_runs(elsewhere, chosen), CONCURRENCY)) as runs:
                async for run in runs:
                    verdicts[run.verdict] += 1
                    done(verdicts.total())
                    session.print(run.as_dict(), partial(show.lines, [run.line()]))
    told = {each.replace(" ", "_"): verdicts[each] for each in VERDICTS}
    told |= {"without_input": known.without_input, "without_output": known.without_output}
    about = {"seed": str(seed), "records": len(known.records), "chosen": len(chosen)}
    counts = show.counts({each: verdicts[each] for each in VERDICTS})
    summary = f"{counts}; {len(chosen)} of {len(known.records)} records, seed {seed}"
    session.print({"challenge": about | told}, lambda: show.line(summary))
    if known.passed_over:
        show.note(f"passed over: {known.passed_over}")
    if verdicts["diverged"] or verdicts[NOT_CONSISTENT]:
        return FAILED
    return UNJUDGED if verdicts["match"] < len(chosen) or known.passed_over else 0


def choice(records: Sequence[sequencer_pb2.ItemRecord], count: int, seed: int) -> list[sequencer_pb2.ItemRecord]:
    """Those with the smallest digests `challenge` of seed, log id and sequence."""

    def rank(record: sequencer_pb2.ItemRecord) -> bytes:
        return tagged_digest("challenge", u64(seed), text(record.admitted.log_id), u64(record.admitted.sequence))

    return sorted(records, key=rank)[:count]


class Records:
    """Completed items with input and output, from the messages of a file."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, int], sequencer_pb2.ItemRecord] = {}
        """By log and sequence."""
        self.without_input = self.without_output = 0
        self._admitted: dict[tuple[str, int], sequencer_pb2.ItemRecord] = {}
        self._previous_hash = b""

    @property
    def passed_over(self) -> str:
        """Empty: no record was."""
        counts = f"{self.without_input} records without input, {self.without_output} without output"
        return counts if self.without_input or self.without_output else ""

    def take(self, place: str, message: Message | Exception) -> None:
        """Raises BadParameter for what is no record."""
        try:
            for record in self._records(message):
                if not record.result.HasField("output"):
                    self.without_output += 1
                elif not record.HasField("input"):
                    self.without_input += 1
                else:
                    self._add(record)
        except (ValueError, DecodeError) as error:
            raise wrong(f"{place}: {error}") from None

    def _add(self, record: sequencer_pb2.ItemRecord) -> None:
        """ValueError: a record of the same item says something else."""
        record.outcome.CopyFrom(record.result.receipt.header)  # what a receipt does not cover is not relied on
        known = self.records.setdefault((record.admitted.log_id, record.admitted.sequence), record)
        said = [(each.input, each.result.output, each.result.receipt.entry_hash) for each in (known, record)]
        if said[0] != said[1]:
            raise ValueError(f"another record of sequence {record.admitted.sequence} of this log is there")

    def _records(self, message: Message | Exception) -> Iterator[sequencer_pb2.ItemRecord]:
        match message:
            case ParseError():
                raise ValueError(str(message))
            case Exception():
                raise ValueError(f"is not JSON: {message}")
            case sequencer_pb2.Entry():
                yield from self._entry(message)
            case sequencer_pb2.GetResponse():
                yield from message.items
            case sequencer_pb2.ItemRecord():
                yield message
            case generation_pb2.GenerateResponse():
                yield from (sequencer_pb2.ItemRecord(result=result) for result in message.results)
            case types_pb2.Result():
                yield sequencer_pb2.ItemRecord(result=message)
            case _:
                raise ValueError("is no record")

    def _entry(self, entry: sequencer_pb2.Entry) -> Iterator[sequencer_pb2.ItemRecord]:
        """The record of an item that ends with this entry, with its input if its admission was here too."""
        previous_hash, self._previous_hash = self._previous_hash, entry.entry_hash
        header, name = entry.header, (entry.header.log_id, entry.header.sequence)
        if header.kind == types_pb2.ENTRY_KIND_ADMITTED and entry.payload:
            given = sequencer_pb2.AdmittedPayload.FromString(entry.payload)
            self._admitted[name] = sequencer_pb2.ItemRecord(admitted=header, input=given)
        elif header.kind in chain.OUTCOMES:
            record = self._admitted.pop(name, sequencer_pb2.ItemRecord())
            if header.kind == types_pb2.ENTRY_KIND_COMPLETED and entry.payload:
                completed = sequencer_pb2.CompletedPayload.FromString(entry.payload)
                record.result.output.CopyFrom(completed.output)
                record.result.receipt.CopyFrom(chain.receipt(header, previous_hash, entry.entry_hash, completed.nonce))
                record.result.sequence, record.result.attempt = header.sequence, header.attempt
            yield record


class Run(NamedTuple):
    """A record that was compared, or that is not consistent."""

    record: sequencer_pb2.ItemRecord
    faults: list[str]
    comparison: types_pb2.Comparison
    result: types_pb2.Result | None
    """Of the other sidecar."""

    @property
    def verdict(self) -> str:
        return NOT_CONSISTENT if self.faults else show.verdict(self.comparison)

    def as_dict(self) -> dict[str, Any]:
        told = {"verdict": self.verdict, "claimed": show.as_dict(self.record), "comparison": show.as_dict(self.comparison)}
        return told | ({"recomputed": show.as_dict(self.result)} if self.result is not None else {})

    def line(self) -> str:
        """What was claimed, what came out there, and where the other sidecar's own log has it."""
        comparison, result = self.comparison, self.result
        expected, actual = show.short(comparison.expected_output_digest), show.short(comparison.actual_output_digest)
        why = ", ".join(self.faults) or comparison.status.message or ", ".join(comparison.drift)
        there = f"sequence {result.sequence} of log {result.receipt.header.log_id}" if result is not None else "-"
        line = f"sequence {self.record.admitted.sequence}: {self.verdict}; output {expected}, there {actual or '-'}, {there}"
        return f"{line}{f'; {why}' if why else ''}"


async def _runs(elsewhere: Elsewhere, chosen: Sequence[sequencer_pb2.ItemRecord]) -> AsyncIterator[Coroutine[Any, Any, Run]]:
    async def run(record: sequencer_pb2.ItemRecord) -> Run:
        if faults := _faults(record):
            return Run(record, faults, types_pb2.Comparison(), None)
        return Run(record, [], *await elsewhere.compared(record, "challenge"))

    for record in chosen:
        yield run(record)


def _faults(record: sequencer_pb2.ItemRecord) -> list[str]:
    if not record.result.HasField("receipt"):
        return ["receipt: missing"]
    receipt = record.result.receipt
    fault = inclusion_fault(receipt) if receipt.HasField("head") else ""
    return chain.check_record(record) + ([f"receipt.{fault}"] if fault else [])
