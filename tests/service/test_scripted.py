"""The scripted engine: deterministic tokens, scripted faults, strict scripts."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostinato import errors
from ostinato.v1 import engine_pb2

from service.answer import Answer
from service.engines.base import Engine, Events, Run
from service.engines.scripted import END, LOGPROBS, ByteVocabulary, Rule, Script, ScriptedEngine, Tokens, choices, parse
from tests.service.support import REPLAY, resolved


def run_of(run_id: int = 1, *, stream: bool = False, prompt: bytes = b"hello", **about: Any) -> Run:
    given = {"sequence": run_id, "attempt": 1, "purpose": engine_pb2.PURPOSE_PRIMARY, "seed": 1}
    parameters = resolved(**{key: value for key, value in about.items() if key not in given})
    return Run(
        run_id=run_id,
        token_ids=tuple(prompt),
        parameters=parameters,
        stream=stream,
        answer=Answer(parameters, ByteVocabulary()),
        **(given | {key: value for key, value in about.items() if key in given}),
    )


async def played(script: Script, *runs: Run, order: list[int] | None = None) -> dict[int, list[engine_pb2.RunEvent]]:
    """All events by run, once every run has ended; into `order` the runs as they finish."""
    events: dict[int, list[engine_pb2.RunEvent]] = {run.run_id: [] for run in runs}
    left, done = set(events), asyncio.Event()

    def on_events(new: Events) -> None:
        for event in new:
            events[event.run_id].append(event)
            if event.WhichOneof("event") in ("finished", "failed"):
                left.discard(event.run_id)
            if order is not None and event.HasField("finished"):
                order.append(event.run_id)
        if not left:
            done.set()

    engine: Engine = ScriptedEngine(script)
    engine.start(on_events, lambda grade, why: None)
    for run in runs:
        engine.submit(run)
    await asyncio.wait_for(done.wait(), 40)
    await engine.close()
    return events


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.invalid("seed", "is odd"), errors.invalid("seed", "is odd")),
        (ValueError("no room"), errors.EngineFailed("no room")),
        (MemoryError(), errors.EngineFailed("MemoryError")),
        ("it stalls", errors.EngineFailed("it stalls")),
    ],
)
def test_a_run_fails_with_the_error_of_its_engine(error: Exception | str, told: errors.OstinatoError) -> None:
    """An error of the contract is reported as it is; anything else is ENGINE_FAILED, with its message or its type's name."""
    assert run_of().failed(error).failed == errors.to_status(told)


def ids_of(events: list[engine_pb2.RunEvent]) -> list[int]:
    return list(events[-1].finished.output.token_ids)


def ids(count: int = 40, **about: Any) -> list[int]:
    """The first tokens of a run, without an engine."""
    tokens = Tokens("scripted", run_of(**about))
    return [tokens.token(index)[0] for index in range(count)]


parameters = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0]),
        "top_k": st.sampled_from([0, 1, 5]),
        "top_p": st.sampled_from([0.5, 1.0]),
        "bad_token_ids": st.lists(st.integers(97, 122), max_size=26, unique=True).map(sorted),
        "ignore_eos": st.booleans(),
        "min_new_tokens": st.integers(0, 8),
        "logprobs": st.integers(0, 20),
    },
)


@given(parameters, st.integers(0, 2**64 - 1))
def test_tokens_are_a_function_of_the_input(given_: dict[str, Any], seed: int) -> None:
    """The same input makes the same tokens, and each by its index alone."""
    tokens = Tokens("scripted", run_of(seed=seed, **given_))

    assert ids(seed=seed, **given_) == [tokens.token(index)[0] for index in reversed(range(40))][::-1]


@given(parameters, st.integers(0, 2**64 - 1))
def test_tokens_obey(given_: dict[str, Any], seed: int) -> None:
    """Banned tokens never come, nor the end before min_new_tokens or with ignore_eos."""
    made = ids(seed=seed, **given_)

    assert not set(made) & set(given_.get("bad_token_ids", []))
    assert END not in made[: given_.get("min_new_tokens", 0)]
    assert not (given_.get("ignore_eos", True) and END in made)


def test_seed_matters_when_sampling() -> None:
    """Two seeds part within sixteen tokens."""
    outcomes = {tuple(ids(16, seed=seed)) for seed in range(300)}

    assert len(outcomes) == 300


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_k": 1}])
def test_greedy_has_no_seed(greedy: dict[str, Any]) -> None:
    """Greedy answers are the same for all seeds."""
    assert ids(seed=1, **greedy) == ids(seed=2, **greedy)


def test_what_matters_changes_tokens() -> None:
    """Another prompt, temperature, top_p, penalty or model makes other tokens; another length or stop does not."""
    base = ids()

    for change in ({"prompt": b"hellp"}, {"temperature": 0.9}, {"top_p": 0.99}, {"repetition_penalty": 1.1}):
        assert ids(**change) != base
    assert [Tokens("other", run_of()).token(index)[0] for index in range(40)] != base
    assert ids(max_new_tokens=1000, stop=["x"]) == base


def test_logprobs_fit_their_tokens() -> None:
    """The chosen token's logprob is that of its place among the likeliest, which descend and do not depend on n."""
    few, many = Tokens("m", run_of(logprobs=2)), Tokens("m", run_of(logprobs=20))
    for index in range(60):
        (token, two), (same, twenty) = few.token(index), many.token(index)
        assert two is not None
        assert twenty is not None
        assert (token, two.logprob, list(two.top)) == (same, twenty.logprob, list(twenty.top)[:2])
        places = {each.token_id: each.logprob for each in twenty.top}
        assert len(places) == 20
        assert places.get(token, twenty.logprob) == twenty.logprob
        assert [each.logprob for each in twenty.top] == list(LOGPROBS[:20])


def test_sampling_parameters_narrow_the_choices() -> None:
    """top_k, top_p and min_p leave fewer choices, never none."""
    assert choices(resolved(temperature=0.0)) == 1
    assert choices(resolved(top_k=3)) == 3
    assert choices(resolved(top_p=0.25)) == 2
    assert choices(resolved(top_p=0.2)) == 1
    assert choices(resolved(min_p=1.0)) == 1
    assert choices(resolved()) > 31


def test_answers_are_readable() -> None:
    """The text is letters, spaces and a little punctuation, and answers end by themselves."""
    made = [ids(2000, seed=seed, ignore_eos=False) for seed in range(5)]

    assert all(END in each for each in made)
    assert all(bytes(each[: each.index(END)]).decode().replace("\n", " ").isprintable() for each in made)


async def test_diverge() -> None:
    """From `at` on the tokens are others, before it the same."""
    rule = Rule("diverge", at=2, purposes=frozenset({"REPLAY"}))
    events = await played(Script(rules=(rule,)), run_of(1), run_of(2, purpose=REPLAY))

    first, second = ids_of(events[1]), ids_of(events[2])
    assert first[:2] == second[:2]
    assert first[2] != second[2]


async def test_diverge_beside_other_runs() -> None:
    """A rule with `company` does not apply to a run that is alone."""
    script = Script(rules=(Rule("diverge", company=True),))
    alone = await played(script, run_of(1))
    together = await played(script, run_of(1), run_of(2))

    assert ids_of(alone[1]) == ids()[:8]
    assert ids_of(together[1]) != ids()[:8]


async def test_forget_seed() -> None:
    """From `at` on the tokens are those of seed 0, whatever the seed."""
    script = Script(rules=(Rule("forget_seed", at=2, sequences=frozenset({1, 2})),))
    sampled: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}
    runs = [run_of(number, seed=seed, **sampled) for number, seed in ((1, 5), (2, 6), (3, 0), (4, 5))]
    first, second, zero, other = [ids_of(events) for events in (await played(script, *runs)).values()]

    assert first[2:] == second[2:] == zero[2:] != other[2:]
    assert first[:2] == other[:2]


async def test_delay_holds_up_one_run() -> None:
    """A delayed run waits; its neighbour does not."""
    script = Script(rules=(Rule("delay", at=1, seconds=0.2, sequences=frozenset({1})),))
    began = time.monotonic()
    events = await played(script, run_of(1), run_of(2))

    assert time.monotonic() - began >= 0.2
    assert ids_of(events[1]) == ids_of(events[2])


async def test_a_new_run_does_not_wait_for_delayed_ones() -> None:
    """While every run is delayed, a new one starts at once."""
    heard: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()

    def on_events(events: Events) -> None:
        for event in events:
            heard.put_nowait((event.run_id, event.WhichOneof("event")))

    engine = ScriptedEngine(Script(rules=(Rule("delay", seconds=1000, sequences=frozenset({1})),)))
    engine.start(on_events, lambda *_: None)
    engine.submit(run_of(1))
    begun = await heard.get()
    for _ in range(10):  # steps of the loop, of which it needs three to be at rest
        await asyncio.sleep(0)
    engine.submit(run_of(2))
    others = [await heard.get(), await heard.get()]

    assert [begun, *others] == [(1, "started"), (2, "started"), (2, "finished")]
    await engine.close()


async def test_room_is_for_the_head() -> None:
    """A run that does not fit the KV cache now delays those after it; one that never fits fails."""
    script = Script(runs=8, kv_blocks=4, block_tokens=10)
    order: list[int] = []
    events = await played(script, *(run_of(i, max_new_tokens=new) for i, new in enumerate((20, 30, 2, 50), 1)), order=order)

    assert [len(ids_of(events[i])) for i in (1, 2, 3)] == [20, 30, 2]
    assert events[4][-1].HasField("failed")
    assert order == [1, 2, 3]


async def test_an_error_does_not_stop_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that goes wrong fails the runs there are, and the engine goes on with the next."""
    monkeypatch.setattr(Tokens, "token", lambda *_, **__: 1 // 0)
    failed = await played(Script(), run_of(1), run_of(2))
    monkeypatch.undo()

    assert all(failed[i][-1].HasField("failed") for i in (1, 2))
    assert ids_of((await played(Script(), run_of(1)))[1]) == ids()[:8]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`, got `array`"),
        ('{"run": 1}', "unknown field `run`"),
        ('{"runs": 0}', r"`int` >= 1 - at `\$.runs`"),
        ('{"delay_seconds": -1}', r"`\$.delay_seconds`"),
        ('{"grade": "BEST"}', r"'BEST' - at `\$.grade`"),
        ('{"rules": [{}]}', r"required field `do` - at `\$.rules\[0\]`"),
        ('{"rules": [{"do": "explode"}]}', r"rules\[0\].do"),
        ('{"rules": [{"do": "fail", "share": 1.5}]}', r"rules\[0\].share"),
    ],
)
def test_script_is_checked_strictly(text: str, complaint: str) -> None:
    """A script with an unknown key or a bad value is refused, and the place is named."""
    with pytest.raises(ValueError, match=complaint):
        parse(text)


def test_rules_spare_the_self_test() -> None:
    """A rule without purposes does not apply to the self-test; one that names it does."""
    test = run_of(1, purpose=0)

    assert not Rule("fail").matches(test)
    assert Rule("fail", purposes=frozenset({"SELF_TEST"})).matches(test)


def test_share_is_a_share() -> None:
    """A share picks about that many runs, always the same ones."""
    rule = Rule("fail", share=0.25)
    chosen = [i for i in range(2000) if rule.matches(run_of(1, sequence=i))]

    assert 400 < len(chosen) < 600
    assert chosen == [i for i in range(2000) if rule.matches(run_of(1, sequence=i))]
