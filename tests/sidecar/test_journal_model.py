"""A journal against a model of fifty lines: any work in any order, reopened, killed and copied or taken over in between."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ostinato.v1 import types_pb2

from sidecar.journal.model import Appended, Draft, Sealed
from sidecar.journal.postgres import PostgresStore
from sidecar.journal.sqlite import SqliteStore
from sidecar.journal.store import Store
from tests.postgres import Postgres
from tests.sidecar.journal_kit import ABOUT_AN_ITEM, Kit, PostgresKit, SqliteKit, admission, item
from tests.sidecar.journal_kit import twin as twin_of

TTL = 100
ADMIT, COMPLETE, END, AUDIT = "admit", "complete", "end", "audit"


@dataclass
class Model:
    """What a journal should say: items by sequence, keys, and how many entries there are."""

    millis: int = 0
    epoch: int = 0
    entries: int = 0
    outcomes: list[str] = field(default_factory=list)
    """Of item 1, 2, ...; empty: none."""
    inputs: list[tuple[int, int]] = field(default_factory=list)
    """Token and seed of item 1, 2, ..."""
    keys: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    """First sequence, count, and when it may be bound again."""
    first_completed: dict[tuple[int, int], int] = field(default_factory=dict)

    def admit(self, inputs: list[tuple[int, int]], key: str) -> tuple[list[int], int | None]:
        """Sequences, or the first one of the batch that the key stands for."""
        bound = self.keys.get(key)
        if key and bound and self.millis < bound[2]:
            return [], bound[0]
        first = len(self.outcomes) + 1
        self.outcomes += [""] * len(inputs)
        self.inputs += inputs
        self.entries += len(inputs)
        if key:
            self.keys[key] = (first, len(inputs), float("inf"))
        return list(range(first, first + len(inputs))), None

    def end(self, sequence: int, outcome: str) -> tuple[bool, int | None]:
        """Whether it counts, and the sequence of its twin."""
        if self.outcomes[sequence - 1]:
            return False, None
        self.outcomes[sequence - 1] = outcome
        self.entries += 1
        for key, (first, count, _) in self.keys.items():
            if first <= sequence < first + count and all(self.outcomes[first - 1 : first - 1 + count]):
                self.keys[key] = (first, count, self.millis + TTL * 1000)
        if outcome != COMPLETE:
            return True, None
        earlier = self.first_completed.setdefault(self.inputs[sequence - 1], sequence)
        return True, earlier if earlier != sequence else None


inputs = st.lists(st.tuples(st.integers(1, 2), st.integers(0, 1)), min_size=1, max_size=3)
keys = st.sampled_from(["", "", "a", "b"])
steps = st.one_of(
    st.tuples(st.just(ADMIT), inputs, keys),
    st.tuples(st.sampled_from([COMPLETE, COMPLETE, END, AUDIT]), st.integers(0, 2**16)),
)


class JournalMachine(RuleBasedStateMachine):
    """Does the same to both and compares."""

    store: Kit
    journal: Store

    def create(self) -> None:
        self.store.configure(idempotency_ttl_seconds=TTL)
        self.model = Model(self.store.clock.millis)
        self.admitted: list[Sealed] = []
        self.open()

    def open(self) -> None:
        self.journal = self.store.open()
        self.model.epoch += 1
        self.model.entries += 1
        head = self.journal.head
        assert (head.epoch, head.index, head.last_sequence) == (self.model.epoch, self.model.entries, len(self.model.outcomes))
        unfinished = [n for n, outcome in enumerate(self.model.outcomes, start=1) if not outcome and self.owned(n)]
        assert [one.admitted for one in self.journal.to_recover] == [self.admitted[n - 1] for n in unfinished]

    def owned(self, sequence: int) -> bool:
        """Whether it is this writer's to finish."""
        return True

    @rule(group=st.lists(steps, min_size=1, max_size=6))
    def commit(self, group: list[tuple]) -> None:  # type: ignore[type-arg]
        """One transaction of several drafts."""
        drafts = [(step, draft) for step in group if (draft := self.draft(step)) is not None]
        answers = self.writing().append_many([draft for _, draft in drafts], self.model.millis)
        for (step, draft), answer in zip(drafts, answers, strict=True):
            self.compare(step, draft, answer)

    def writing(self) -> Store:
        """The journal that appends next."""
        return self.journal

    def draft(self, step: tuple) -> Draft | None:  # type: ignore[type-arg]
        if step[0] == ADMIT:
            return admission(*(item(token, seed=seed) for token, seed in step[1]), key=step[2])
        if not self.admitted:
            return None
        return ABOUT_AN_ITEM[step[0]](self.admitted[step[1] % len(self.admitted)])

    def compare(self, step: tuple, draft: Draft, answer: Appended) -> None:  # type: ignore[type-arg]
        numbers = [entry.header.sequence for entry in answer.entries]
        if step[0] == ADMIT:
            expected, bound = self.model.admit(step[1], step[2])
            self.admitted += answer.entries
            assert numbers == expected
            assert (answer.binding.first_sequence if answer.binding else None) == bound
        elif step[0] == AUDIT:
            self.model.entries += 1
            assert len(numbers) == 1
        else:
            counts, twin = self.model.end(draft.admitted.sequence, step[0])  # type: ignore[union-attr]
            assert numbers == ([draft.admitted.sequence] if counts else [])  # type: ignore[union-attr]
            assert [said.expected_sequence for entry in answer.entries if (said := twin_of(entry))] == ([twin] if twin else [])

    @rule(seconds=st.sampled_from([1, TTL // 2, TTL]))
    def sleep(self, seconds: int) -> None:
        self.store.clock.sleep(seconds)
        self.model.millis = self.store.clock.millis

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.open()

    @precondition(lambda self: hasattr(self, "journal"))
    @invariant()
    def agrees(self) -> None:
        """Everything that can be read says what the model says."""
        model = self.model
        head = self.journal.newest()
        assert (head.index, head.last_sequence) == (model.entries, len(model.outcomes))
        kinds = {types_pb2.ENTRY_KIND_COMPLETED: COMPLETE, types_pb2.ENTRY_KIND_FAILED: END}
        found = self.journal.items(1, 2**64 - 1, 10_000)
        assert [pair.admitted for pair in found] == self.admitted
        assert [kinds[pair.outcome.header.kind] if pair.outcome else "" for pair in found] == model.outcomes
        for key in ("a", "b"):
            bound = model.keys.get(key)
            binding = self.journal.binding("", key, model.millis)
            live = bound is not None and model.millis < bound[2]
            assert (binding.first_sequence if binding else None) == (bound[0] if bound and live else None)

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.journal.close()
            assert self.store.faults() == []


class SqliteMachine(JournalMachine):
    """In a file, which is copied when it is killed."""

    store: SqliteKit
    journal: SqliteStore

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="journal-"))
        self.store = SqliteKit(self.folder / "0.db")
        self.create()

    @rule()
    def kill(self) -> None:
        """What is in the files at this moment is all that there is: no close, no checkpoint."""
        killed, path = self.journal, self.folder / f"{self.model.epoch}.db"
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{self.store.path}{suffix}", f"{path}{suffix}")
        killed.close()
        self.store.path = path
        self.open()

    @rule()
    def checkpoint(self) -> None:
        self.journal._db.wal_checkpoint()

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


class PostgresMachine(JournalMachine):
    """In a schema, with another writer that appends too, and takes over."""

    server: Postgres
    store: PostgresKit
    other: PostgresStore

    @initialize()
    def begin(self) -> None:
        self.store = PostgresKit(self.server.url(self.server.schema()))
        self.remote, self.others, self.seconds = False, set[int](), 0.0
        self.create()
        self.other = self.store.open(writer="other", seconds=lambda: self.seconds)
        self.model.entries += 1

    @rule()
    def change(self) -> None:
        """The other writer appends from here on, or no longer."""
        self.remote = not self.remote

    def writing(self) -> Store:
        return self.other if self.remote else self.journal

    def compare(self, step: tuple, draft: Draft, answer: Appended) -> None:  # type: ignore[type-arg]
        super().compare(step, draft, answer)
        if self.remote and step[0] == ADMIT:
            self.others.update(entry.header.sequence for entry in answer.entries)

    def owned(self, sequence: int) -> bool:
        return sequence not in self.others

    @rule()
    def kill(self) -> None:
        assert isinstance(self.journal, PostgresStore)
        self.journal._database.drop()
        self.open()

    @rule()
    def take_over(self) -> None:
        """The first writer is gone for long enough, and comes back."""
        self.store.execute("UPDATE writers SET lease_until = clock_timestamp() - interval '1 second' WHERE name = 'writer'")
        self.seconds += 1 + self.store.settings.lease_seconds
        taken = [one.admitted.header.sequence for one in self.other.maintain(self.model.millis, idle=True)]
        left = [n for n, outcome in enumerate(self.model.outcomes, start=1) if not outcome and n not in self.others]
        assert taken == left
        self.others.update(taken)
        if taken:
            self.model.entries += 1
            self.model.epoch += 1
            self.journal.close()
            self.open()

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "store"):
            self.store.kill()


TestSqliteModel = SqliteMachine.TestCase
TestSqliteModel.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class TestPostgresModel(PostgresMachine.TestCase):  # type: ignore[misc, valid-type]
    """On the session's server."""

    settings = settings(max_examples=10, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

    @pytest.fixture(autouse=True)
    def _server(self, postgres: Postgres) -> None:
        PostgresMachine.server = postgres
