"""What runs of known prompts prove at start: the prefix cache, pieces of prompts, and TurboMind's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from service.engines.turbomind import PIECE_TOKENS, TurbomindOptions, engine, probe
from service.engines.turbomind.exactness import Exactness
from service.engines.turbomind.kernels import Product
from service.engines.turbomind.native import FINISHED, Native
from service.engines.turbomind.overrides import Counters, Overrides, Resume
from service.engines.turbomind.probe import KernelProof, prove_kernels, prove_pieces, prove_prefix_cache
from service.engines.turbomind.request import Request
from tests.service.turbomind_kit import MODEL, FakeHandle, FakeNative


@dataclass
class FakeTurboMind(FakeNative):
    """Ends every run at once, and is its own overrides. Calls the override for every prompt if `calls_override`."""

    caches: bool = True
    calls_override: bool = True
    late: int = 0
    """The first prompts that do not find cached blocks."""
    prompt_shift: int = 0
    resume_shift: int = 0
    """Added to the number that the override reads."""
    ignores_override: bool = False
    omitted: frozenset[str] = frozenset()
    misreads: bool = False
    """The override of pieces reads other numbers."""
    pieces_seen: int = 2
    """In which a prompt longer than a piece is computed."""
    rounding: dict[int, str] = field(default_factory=dict)
    """By number of rows, how the kernels tuned for it round; "?" depends on what runs beside."""
    served: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    step: tuple[int, int, int] = (0, 0, 0)
    piece_tokens: int = 0
    cuts: int = 0
    strays: int = 0
    mode: Resume = Resume.UNWATCHED
    resumed: tuple[int, int] = (0, 0)
    modes: list[Resume] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    _calls: int = 0

    @property
    def counters(self) -> Counters:
        return Counters({"resume": self._calls}, 0, 0, cuts=self.cuts, strays=self.strays)

    def pieces(self, piece_tokens: int, step_tokens: int, context_tokens: int) -> None:
        self.piece_tokens = 0 if "piece" in self.omitted else piece_tokens

    def kernels(self, served: dict[tuple[int, ...], list[int]]) -> None:
        self.served = served

    def resume(self, mode: Resume) -> None:
        self.mode = mode
        self.modes.append(mode)

    def start(
        self, run_id: int, ids: Sequence[int], request: Request, grammar: object, change: Callable[[], None]
    ) -> FakeHandle:
        handle = super().start(run_id, ids, request, grammar, change)
        found = handle.account.cached
        if found and self.late:
            self.late, found = self.late - 1, 0
        self.prompts.append(len(ids))
        self._calls += self.calls_override
        if self.calls_override and self.mode != Resume.UNWATCHED:
            self.resumed = len(ids) + self.prompt_shift, found + self.resume_shift
        self.step = (1, 0, 0) if self.misreads else (0, len(ids), len(ids))
        self.cuts += (self.pieces_seen - 1) * bool(self.piece_tokens and len(ids) > self.piece_tokens + 1)
        corrected = self.mode == Resume.CORRECT and not self.ignores_override and len(ids) - found == 1
        handle.account = replace(handle.account, cached=found - corrected)
        rounds = "".join(self.rounding[row] for rows in self.served.values() for row in rows[:1])
        answer = hash((len(ids), rounds, run_id if "?" in rounds else 0)) % 2**31
        handle.rows = [{answer: 0.0}] * request.max_new_tokens
        handle.make([answer] * request.max_new_tokens, FINISHED)
        return handle


def proof(turbomind: FakeTurboMind) -> str:
    return prove_prefix_cache(cast(Native, turbomind), cast(Overrides, turbomind))


def test_plans_are_found_right_before_any_is_corrected() -> None:
    """Plans are watched first and then corrected, for rests of 0, 1 and 2 tokens."""
    turbomind = FakeTurboMind()

    assert (proof(turbomind), turbomind.modes) == ("", [Resume.WATCH, Resume.CORRECT])
    assert turbomind.prompts == [130, 130, 129, 128, 130, 129, 128, 130]


def test_blocks_may_be_published_a_moment_late() -> None:
    """Blocks may be published a moment late."""
    assert proof(FakeTurboMind(late=2)) == ""


@pytest.mark.parametrize(
    ("turbomind", "why"),
    [
        (FakeTurboMind(calls_override=False), "TurboMind does not reach the override resume"),
        (FakeTurboMind(caches=False), "TurboMind took 0 of 129 prompt tokens from its cache, not 128"),
        (FakeTurboMind(prompt_shift=1), "of a prompt of 130 tokens, 0 of them cached, the override resume reads 131 and 0"),
        (FakeTurboMind(resume_shift=7), "of a prompt of 130 tokens, 0 of them cached, the override resume reads 130 and 7"),
        (
            FakeTurboMind(ignores_override=True),
            "with the override resume TurboMind took 128 of 129 prompt tokens from its cache, not 127",
        ),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_corrected(turbomind: FakeTurboMind, why: str) -> None:
    """If the two numbers are elsewhere in another build, nothing is written."""
    assert (proof(turbomind), turbomind.modes[-1]) == (why, Resume.UNWATCHED)


def test_sabotage_leaves_out_the_correction_alone() -> None:
    """Leaving out the override leaves out the correction only, so the self-test must find it."""
    turbomind = FakeTurboMind(omitted=frozenset({"resume"}))

    assert (proof(turbomind), turbomind.modes) == ("", [Resume.WATCH])


def test_two_starts_leave_no_common_prompt_in_the_cache() -> None:
    """The prompts are random, because no request may use blocks that unproved kernels computed."""
    first, second = FakeTurboMind(), FakeTurboMind()
    proof(first)
    proof(second)

    assert not first.blocks & second.blocks


@pytest.mark.parametrize(
    ("options", "why", "loaded", "on"),
    [
        ({}, "", [True], True),
        ({}, "it does not fit", [True, False], False),
        ({"prefix_cache": "off"}, "", [False], False),
        ({"context_tokens": 128}, "", [False], False),
    ],
)
def test_a_cache_that_does_not_fit_is_off(
    options: dict[str, Any],
    why: str,
    loaded: list[bool],
    on: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If the proof fails, the model is loaded again without the cache and the log says why; if the cache is off, nothing is
    proved."""
    made: list[bool] = []
    closed: list[bool] = []

    def native(options: object, described: object, *, prefix_cache: bool) -> Any:
        made.append(prefix_cache)
        return SimpleNamespace(dtype="float16", close=lambda: closed.append(prefix_cache))

    monkeypatch.setattr(engine, "Native", native)
    monkeypatch.setattr(probe, "first_run", lambda native, context: 0.25)
    monkeypatch.setattr(probe, "prove_prefix_cache", lambda native, overrides: why)
    given = TurbomindOptions(**options)
    exactness = Exactness(given, MODEL, cast(Overrides, FakeTurboMind()))
    _, share, prefix_cache = engine._model(given, MODEL, exactness)

    assert (made, closed, share, prefix_cache) == (loaded, [True] if len(loaded) > 1 else [], 0.25, on)
    said = [vars(record)["why"] for record in caplog.records if record.message == "prefix cache off"]
    assert said == ([why] if why else [])


@pytest.mark.parametrize(
    ("turbomind", "given", "why", "piece_tokens"),
    [
        (FakeTurboMind(), {}, "", PIECE_TOKENS),
        (FakeTurboMind(), {"context_tokens": 100}, "", PIECE_TOKENS),
        (FakeTurboMind(pieces_seen=3), {"tp": 2}, "", PIECE_TOKENS),  # each of two GPUs has cut it once
        (FakeTurboMind(pieces_seen=2), {"tp": 2}, "computed a prompt of 2176 tokens in 1.5 pieces, not 2", PIECE_TOKENS),
        (FakeTurboMind(pieces_seen=1, omitted=frozenset({"piece"})), {}, "", 0),
        (FakeTurboMind(misreads=True), {}, "of a prompt of 2176 tokens the override piece reads (1, 0, 0)", 0),
        (FakeTurboMind(strays=1), {}, "does not find a prompt among those of its pass", PIECE_TOKENS),
        (FakeTurboMind(pieces_seen=3), {}, "computed a prompt of 2176 tokens in 3 pieces, not 2", PIECE_TOKENS),
    ],
)
def test_prompts_are_cut_once_the_override_reads_right(
    turbomind: FakeTurboMind, given: dict[str, Any], why: str, piece_tokens: int
) -> None:
    """A prompt longer than a piece must be cut as expected, on each GPU; a small context has none."""
    options = TurbomindOptions(**({"context_tokens": 4096, "runs": 8} | given))
    found = prove_pieces(cast(Native, turbomind), cast(Overrides, turbomind), options)

    assert why in found if why else not found
    assert turbomind.piece_tokens == piece_tokens


def product(depth: int, experts: int = 0) -> Product:
    return Product(tuple(depth if place == 24 else experts if place == 25 else 9 * (place == 23) for place in range(26)))


EXPERTS, DENSE = product(5, 64), product(7)


def kernel_proof(rounding: dict[int, str]) -> KernelProof:
    turbomind = FakeTurboMind(rounding=rounding | {80: "", 160: "", 640: ""})
    tuned = {EXPERTS: dict.fromkeys((8, 16, 64, 128), "8x256x64"), DENSE: dict.fromkeys((80, 160, 640), "64x128x64")}
    return prove_kernels(cast(Native, turbomind), cast(Overrides, turbomind), tuned)


@pytest.mark.parametrize(
    ("rounding", "experts", "classes"),
    [
        ({8: "a", 16: "a", 64: "a", 128: "a"}, (8, 16, 64, 128), (0, 0, 0, 0)),
        ({8: "b", 16: "a", 64: "a", 128: "a"}, (16, 64, 128), (0, 1, 1, 1)),
        ({8: "b", 16: "b", 64: "a", 128: "a"}, (64, 128), (0, 0, 1, 1)),
        ({8: "?", 16: "?", 64: "?", 128: "a"}, (128,), (-1, -1, -1, 0)),
    ],
)
def test_kernels_that_round_alike_are_permitted(
    rounding: dict[int, str], experts: tuple[int, ...], classes: tuple[int, ...]
) -> None:
    """The kernels with the most common answers are permitted, of equals those for more rows, and never one whose answers
    depend on other runs."""
    found = kernel_proof(rounding)

    assert (found.permitted[EXPERTS], found.classes) == (experts, classes)
    assert len(found.excluded) == 4 - len(experts)


def test_kernels_that_are_not_permitted_are_named() -> None:
    """Excluded kernels are named by product, number of rows and tile."""
    found = kernel_proof({8: "a", 16: "a", 64: "a", 128: "?"})

    assert found.excluded == ("9 x 5 of 64 experts for 128 rows (tile 8x256x64), 9 x 7 for 640 rows (tile 64x128x64)",)
    assert found.permitted == {EXPERTS: (8, 16, 64), DENSE: (80, 160, 640)}


def test_no_kernel_is_permitted_where_all_depend_on_the_batch() -> None:
    """If all kernels depend on the batch, none is permitted."""
    assert not kernel_proof(dict.fromkeys((8, 16, 64, 128), "?")).permitted
