"""`ostinato replay`: verdicts, the view of a difference, interruptions, another sidecar; and bounded_gather."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from ostinato import digest, errors
from ostinato.replay import bounded_gather
from ostinato.v1 import generation_pb2, sequencer_pb2, types_pb2

from tests.ostinato.fake import MODEL, Fake, Terminal, start

COUNTS = "{} match, {} diverged, {} incomparable, {} not compared, {} passed over"


@pytest.fixture(name="ostinato")
def _ostinato(ostinato: Terminal) -> Terminal:
    """The command with a sidecar that has sequences 1 to 6."""
    assert ostinato("generate", "a", "b", "c", "--seed", 2**64 - 1, "--temperature", 0).exit_code == 0
    assert ostinato("generate", "d", "e", "f", "--logprobs", 0).exit_code == 0
    ostinato.fake.calls.clear()
    return ostinato


def spans(fake: Fake) -> list[tuple[int, int]]:
    return [(call.request.range.first, call.request.range.last) for call in fake.calls if call.method == "Replay"]


@pytest.mark.parametrize(
    ("range_", "expected"),
    [("1..3", (1, 3)), ("2..", (2, 6)), ("..4", (1, 4)), ("..", (1, 6)), ("5", (5, 5)), ("3..18446744073709551615", (3, 6))],
)
def test_ranges(ostinato: Terminal, range_: str, expected: tuple[int, int]) -> None:
    """A range is A..B, A.., ..B or one sequence, and ends at the newest."""
    result = ostinato("replay", range_, "--concurrency", 2, "--alone")

    count = expected[1] - expected[0] + 1
    assert (result.exit_code, result.stdout) == (0, COUNTS.format(count, 0, 0, 0, 0) + "\n")
    assert spans(ostinato.fake) == [expected]


def test_an_unknown_range_is_an_error(ostinato: Terminal) -> None:
    """A range after the newest sequence exits 1, and the message has the newest."""
    result = ostinato("replay", "7..9")
    assert (result.exit_code, result.stderr) == (1, "error: NOT_FOUND: the newest sequence is 6\n")


def test_who_is_no_operator_names_both_ends(ostinato: Terminal) -> None:
    """A caller without the right to Head can replay a range whose last item exists; another is NOT_FOUND."""
    ostinato.fake.script["Head"].extend([errors.PermissionDenied("Head is for operators")] * 2)
    known, ahead = ostinato("replay", "2..6"), ostinato("replay", "2..7")

    assert (known.exit_code, known.stdout) == (0, COUNTS.format(5, 0, 0, 0, 0) + "\n")
    assert (ahead.exit_code, ahead.stderr) == (1, "error: NOT_FOUND: no item 7\n")
    assert spans(ostinato.fake) == [(2, 6)]


@pytest.mark.parametrize(
    ("temperature", "weight"), [(0, "no near-tie"), (0.5, "but sampled: the draw decides, not the likeliest token")]
)
def test_a_divergence_is_shown_side_by_side(ostinato: Terminal, temperature: float, weight: str) -> None:
    """A divergence prints both texts with the first difference, both tokens, margin, seed and parameters, and exits 1."""
    ostinato.fake.diverging = {5}
    ostinato.fake.records[5].input.parameters.temperature = temperature
    recorded = ostinato.fake.records[5].result.output
    now = ostinato.fake.another(recorded)

    result = ostinato("replay", "4..6")

    lines = [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert lines == [
        ["5 diverged at token 2"],
        ["recorded", "now"],
        ["text", f"{recorded.text[:2]}▶{recorded.text[2:]}", f"{now.text[:2]}▶\\n{now.text[3:]}"],
        ["token 2", str(recorded.token_ids[2]), str(now.token_ids[2])],
        ["logprob", f"{recorded.logprobs[2].logprob:.6f}", f"{now.logprobs[2].logprob:.6f}"],
        ["tokens", "4, length", "4, length"],
        ["margin", f"0.250000, {weight}"],
        ["seed", str(recorded.seed)],
        ["parameters", f"temperature {temperature:g}, max_new_tokens 4"],
        [COUNTS.format(2, 1, 0, 0, 0)],
    ]


def test_json_is_a_response_a_line(ostinato: Terminal) -> None:
    """--json prints a ReplayResponse per line; a divergence has both outputs. An item that did not complete is passed over."""
    ostinato.fake.diverging = {2}
    ostinato.fake.records[4].outcome.kind = types_pb2.ENTRY_KIND_FAILED
    passed_over = ostinato("replay", "3..4")
    assert (passed_over.exit_code, passed_over.stdout) == (0, COUNTS.format(1, 0, 0, 0, 1) + "\n")
    result = ostinato("replay", "1..3", "--json")
    said = [json_format.ParseDict(json.loads(line), sequencer_pb2.ReplayResponse()) for line in result.stdout.splitlines()]
    assert (result.exit_code, [each.seen for each in said], {each.total for each in said}) == (1, [1, 2, 3], {3})
    assert said[1].record == ostinato.fake.records[2]
    assert said[1].comparison.actual == ostinato.fake.another(ostinato.fake.records[2].result.output)
    assert not said[0].HasField("record")


def test_what_cannot_be_judged_is_three(ostinato: Terminal) -> None:
    """Drift and failed runs are printed with their reasons and exit 3, unless an item diverged."""
    drift = types_pb2.Comparison(sequence=1, verdict=types_pb2.VERDICT_INCOMPARABLE, drift=["fingerprint.device", "input"])
    failed = types_pb2.Comparison(sequence=2, status=errors.to_status(errors.EngineFailed("broke")))
    diverged = types_pb2.Comparison(sequence=3, verdict=types_pb2.VERDICT_DIVERGED, first_difference=0)
    said = [sequencer_pb2.ReplayResponse(comparison=each) for each in (drift, failed, diverged)]
    ostinato.fake.script["Replay"].extend([said[:2], said])

    unjudged, all_three = ostinato("replay", "1..2"), ostinato("replay", "1..3")

    assert (unjudged.exit_code, all_three.exit_code) == (3, 1)
    assert unjudged.stdout.splitlines() == [
        "1 incomparable: fingerprint.device, input",
        "2 not compared: broke",
        COUNTS.format(0, 0, 1, 1, 0),
    ]


# ---- interruptions


def test_a_lost_sidecar_is_said(ostinato: Terminal) -> None:
    """A replay that breaks off says how far it came, counts what it has seen, and fails with the error."""
    failed = types_pb2.Comparison(sequence=4, status=errors.to_status(errors.DeadlineExceeded("slow")))
    said = [match(1), match(3), sequencer_pb2.ReplayResponse(passed_over=[2]), sequencer_pb2.ReplayResponse(comparison=failed)]
    ostinato.fake.script["Replay"].append([*said, errors.EngineUnavailable("the engine was lost")])

    broken = ostinato("replay", "..")

    assert (broken.exit_code, broken.stdout) == (1, "4 not compared: slow\n")
    assert broken.stderr.splitlines() == [
        f"interrupted after 4 of 6: {COUNTS.format(2, 0, 0, 1, 1)}",
        "error: ENGINE_UNAVAILABLE: the engine was lost",
    ]


def test_an_interrupt_is_said(ostinato: Terminal) -> None:
    """Ctrl-C exits 130 and says how far it came."""
    ostinato.fake.script["Replay"].append([match(1), match(2), lambda: asyncio.sleep(60)])
    with start("replay", "1..", "--json", target=ostinato.target) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)

    assert (process.returncode, len(lines)) == (130, 2)
    assert err == f"interrupted after 2 of 6: {COUNTS.format(2, 0, 0, 0, 0)}\n"


def match(sequence: int) -> sequencer_pb2.ReplayResponse:
    return sequencer_pb2.ReplayResponse(
        comparison=types_pb2.Comparison(sequence=sequence, verdict=types_pb2.VERDICT_MATCH), total=6
    )


# ---- elsewhere


def test_another_sidecar_gives_the_same(ostinato: Terminal, elsewhere: tuple[Fake, str]) -> None:
    """The other sidecar gets the recorded token ids, all parameters and the seed, and its outputs are compared here."""
    ostinato.fake.records[2].outcome.kind = types_pb2.ENTRY_KIND_CANCELLED
    ostinato.fake.records[3].result.ClearField("output")
    ostinato.fake.records[4].input.parameters.bad_token_ids.append(7)
    other, target = elsewhere

    result = ostinato("replay", "1..", "--against", target)

    assert (result.exit_code, result.stdout.splitlines()[-1]) == (3, COUNTS.format(3, 0, 0, 2, 1))
    resolved = set(types_pb2.ResolvedParameters.DESCRIPTOR.fields_by_name)
    asked = {call.request.items[0].parameters.seed: call.request for call in other.calls if call.method == "Generate"}
    assert set(asked) == {ostinato.fake.records[each].admitted.seed for each in (1, 5, 6)}
    request = asked[2**64 - 1]
    assert list(request.items[0].token_ids.ids) == list(b"a")
    given = {field.name for field, _ in request.items[0].parameters.ListFields()}
    unset = {"stop", "stop_token_ids", "bad_token_ids", "logprobs", "response_format", "keep_special_tokens", "parse"}
    assert given == resolved - unset | {"seed", "skip_special_tokens"}
    assert spans(ostinato.fake) == []


def test_drift_elsewhere_names_its_fields(ostinato: Terminal, elsewhere: tuple[Fake, str]) -> None:
    """Another fingerprint is INCOMPARABLE with its fields, and the tokens are still compared."""
    other, target = elsewhere
    fields = {"model": "fake-1", "threads": "2", "driver": "9"}
    model = types_pb2.Model(fingerprint=types_pb2.Fingerprint(digest=digest.fingerprint_digest(fields), fields=fields))
    other.script["GetModel"].append(generation_pb2.GetModelResponse(model=model))

    def drift(result: types_pb2.Result) -> None:
        result.receipt.header.fingerprint_digest = model.fingerprint.digest

    def differ(result: types_pb2.Result) -> None:
        drift(result)
        result.output.CopyFrom(other.another(result.output))

    other.script["Generate"].extend(map(other.altering, (drift, differ)))
    result = ostinato("replay", "1..2", "--against", target, "--concurrency", 1)

    lines = result.stdout.splitlines()
    assert lines[0] == "1 incomparable: fingerprint.driver, fingerprint.threads; the outputs are equal"
    assert lines[1] == "2 incomparable: fingerprint.driver, fingerprint.threads; the outputs differ from token 2 on"
    assert lines[3].split()[1:] == [
        f"{text[:2]}▶{text[2:]}".replace("\n", r"\n")
        for text in (
            ostinato.fake.records[2].result.output.text,
            other.another(ostinato.fake.records[2].result.output).text,
        )
    ]
    assert (result.exit_code, lines[-1]) == (3, COUNTS.format(0, 0, 2, 0, 0))
    assert MODEL.fingerprint.fields.keys() ^ fields.keys() == {"driver"}


def test_a_full_queue_elsewhere_is_waited_for(ostinato: Terminal, elsewhere: tuple[Fake, str]) -> None:
    """An item that gets QUEUE_FULL is sent again; one that is invalid there counts as not compared."""
    other, target = elsewhere
    other.script["Generate"].extend([errors.QueueFull("full", retry_after=0.01), errors.invalid("items[0].token_ids", "no")])
    result = ostinato("replay", "1", "--against", target)
    assert result.stdout.splitlines() == ["1 not compared: items[0].token_ids: no", COUNTS.format(0, 0, 0, 1, 0)]
    assert other.count("Generate") == 2


def test_nobody_elsewhere_breaks_the_replay(ostinato: Terminal) -> None:
    """If the other sidecar cannot be reached, the command fails, and says how far it came."""
    result = ostinato("replay", "1..", "--against", "127.0.0.1:1")
    said = f"interrupted after 0 of 6: {COUNTS.format(0, 0, 0, 0, 0)}"
    assert (result.exit_code, result.stderr.splitlines()[0]) == (1, said)


# ---- bounded_gather


class Works:
    """Numbered coroutines that take this many turns of the loop; the one with the number `breaks` raises."""

    def __init__(self, turns: list[int], breaks: int = -1) -> None:
        self.turns, self.breaks = turns, breaks
        self.running = self.most = self.begun = 0

    async def __aiter__(self) -> AsyncIterator[Coroutine[Any, Any, int]]:
        for number in range(len(self.turns)):
            yield self._work(number)

    async def _work(self, number: int) -> int:
        self.begun += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(self.turns[number]):
                await asyncio.sleep(0)
            if number == self.breaks:
                raise LookupError(number)
            return number
        finally:
            self.running -= 1


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(1, 6))
def test_every_result_and_never_too_many(turns: list[int], most: int) -> None:
    """Each result comes once, and at most `limit` coroutines run at once."""

    async def run() -> None:
        works = Works(turns)
        found = [result async for result in bounded_gather(works, most)]
        assert sorted(found) == list(range(len(turns)))
        assert works.most <= most

    asyncio.run(run())


async def test_the_first_failure_ends_all() -> None:
    """A failure cancels the running coroutines and starts no more."""
    works = Works([50, 2, 50, 50, 50], breaks=1)
    with pytest.raises(LookupError):
        _ = [result async for result in bounded_gather(works, 3)]
    assert (works.begun, works.running) == (3, 0)


async def test_who_leaves_ends_all() -> None:
    """Closing it cancels the running coroutines before the close returns."""
    works = Works([1, 500, 500])
    async with aclosing(bounded_gather(works, 3)) as results:
        async for _ in results:
            break
    assert works.running == 0
