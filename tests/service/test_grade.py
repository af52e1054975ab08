"""The self-test: which engine earns which grade and why, and which proofs count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict, replace

from ostinato.v1 import engine_pb2, types_pb2
from serving.program import StartupError

from service.cases import background_load, compared_cases
from service.engines.scripted import ScriptedEngine, parse
from service.proofs import Finding, Proofs, code_digest
from tests.service.support import served

EXACT, SERIAL, BEST_EFFORT = types_pb2.GRADE_EXACT, types_pb2.GRADE_SERIAL, types_pb2.GRADE_BEST_EFFORT


async def model(script: dict[str, Any], **settings: Any) -> types_pb2.Model:
    async with served(script, **{"self_test": "full", **settings}) as service:
        return (await service.stub.Describe(engine_pb2.DescribeRequest())).model


def fault(do: str, **about: Any) -> dict[str, Any]:
    return {"rules": [{"do": do, "purposes": ["SELF_TEST"], **about}]}


@pytest.mark.parametrize(
    ("script", "settings", "grade", "reason"),
    [
        ({}, {}, EXACT, "64 prompts of 2 to 300 tokens"),
        *(
            (fault("diverge", company=True, at=at), {}, BEST_EFFORT, f"another token at {at} together with the other prompts")
            for at in (0, 5, 11)
        ),
        ({"runs": 1}, {}, SERIAL, "twice, one at a time"),
        ({"grade": "BEST_EFFORT"}, {}, BEST_EFFORT, "the script says so"),
        (fault("fail", at=3), {}, BEST_EFFORT, "a run of the self-test failed"),
        (fault("lose_grade", at=3, to="SERIAL"), {}, SERIAL, "the script lowers it"),
        ({}, {"self_test": "off"}, BEST_EFFORT, "not tested"),
    ],
)
async def test_an_engine_earns_what_it_shows(script: dict[str, Any], settings: dict[str, Any], grade: int, reason: str) -> None:
    """An engine whose answers do not depend on the batch earns EXACT, one that runs one at a time SERIAL, and the reason says
    what was compared. One whose tokens depend on the batch does not, and the reason names the first difference; nor one of
    which a run fails. A configuration that cannot earn EXACT is not tested, a grade that is lost during the test cannot be
    earned by it, and without a test the grade is BEST_EFFORT."""
    found = await model(script, **settings)

    assert (found.grade, reason in found.grade_reason) == (grade, True), found.grade_reason


async def test_hanging_run_is_best_effort() -> None:
    """A self-test that does not end in time gives BEST_EFFORT and stops its runs."""
    async with served(fault("hang", at=3), self_test="full", self_test_timeout_seconds=0.2) as service:
        found = (await service.stub.Describe(engine_pb2.DescribeRequest())).model

        assert (found.grade, found.grade_reason) == (BEST_EFFORT, "the self-test did not end within 0.2 s")
        assert not service.engine._active


async def test_required_grade_stops_the_service() -> None:
    """A service that does not earn its required grade does not start."""
    with pytest.raises(StartupError, match="^--require-grade: EXACT is required, BEST_EFFORT was earned"):
        await model(fault("diverge", company=True), require_grade="EXACT")

    assert (await model({}, require_grade="SERIAL")).grade == EXACT


def engine_of(**script: int) -> ScriptedEngine:
    return ScriptedEngine(parse(json.dumps(script)))


@pytest.mark.parametrize("context", [2, 8, 40, 4096])
def test_cases_fit_small_contexts(context: int) -> None:
    """The lengths of prompts and answers fit a small context."""
    engine = engine_of(context_tokens=context, runs=64)
    for case in [*compared_cases(engine), *background_load(engine)]:
        assert case.token_ids
        assert len(case.token_ids) + case.parameters.max_new_tokens <= context


@pytest.mark.parametrize(("runs", "count"), [(8, 7), (31, 7), (32, 32), (256, 64)])
def test_cases_differ(runs: int, count: int) -> None:
    """A batch of up to 64 for an engine that runs as many; prompts and seeds differ, and all kinds of sampling occur."""
    made = compared_cases(engine_of(context_tokens=4096, runs=runs))

    assert len({case.token_ids for case in made}) == len({case.seed for case in made}) == len(made) == count
    assert {case.parameters.temperature == 0 for case in made} == {True, False}
    assert {case.parameters.repetition_penalty == 1 for case in made} == {True, False}


def test_an_engine_that_cuts_prompts_gets_longer_ones() -> None:
    """They have one piece and more, as far as the context has room; an engine without pieces gets none."""
    lengths = {}
    for context in (300, 4096):
        engine = engine_of(context_tokens=context, runs=8)
        engine.piece_tokens = 256
        lengths[context] = [len(case.token_ids) for case in compared_cases(engine) if case.name.startswith("of ")]

    assert lengths == {300: [258, 257], 4096: [956, 321, 258, 257]}
    assert max(len(case.token_ids) for case in compared_cases(engine_of(context_tokens=4096, runs=8))) == 300


FINDING = Finding(EXACT, "all equal", 1.5, 200)


def test_proof_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A proof is found under its fingerprint and by its version of the test only; it replaces an earlier one, and no temporary
    file is left."""
    proofs = Proofs(tmp_path / "proofs", "code")
    proofs.keep(b"f" * 32, replace(FINDING, reason="another"), "")
    proofs.keep(b"f" * 32, FINDING, "2026-01-01T00:00:00+00:00")

    assert len(list((tmp_path / "proofs").iterdir())) == 1
    assert proofs.find(b"f" * 32) == replace(FINDING, reason="all equal; proved at 2026-01-01T00:00:00+00:00")
    assert proofs.find(b"g" * 32) is None
    monkeypatch.setattr("service.proofs.VERSION", "another")
    assert proofs.find(b"f" * 32) is None
    assert caplog.text == ""


@pytest.mark.parametrize(
    "change",
    [
        *({"code": "new"}, {"fingerprint": "00"}, {"more": 1}),
        *({"finding": asdict(FINDING) | {"grade": grade}} for grade in ("GRADE_BEST", -1, 0, 4)),
        *(b"", b"{", b"\xff", b"[]", b"null"),
    ],
)
def test_proof_that_does_not_fit_is_ignored(tmp_path: Path, change: dict[str, object] | bytes) -> None:
    """A proof by other code, for another fingerprint, in another form or with a grade that there is not is ignored, and so is a
    file with another content."""
    proofs = Proofs(tmp_path, "code")
    proofs.keep(b"f" * 32, FINDING, "")
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    path.write_bytes(change if isinstance(change, bytes) else json.dumps(kept | change).encode())

    assert proofs.find(b"f" * 32) is None


def test_unusable_directory_is_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A state directory that cannot be written is a warning; the next start tests again."""
    (tmp_path / "file").write_text("")
    proofs = Proofs(tmp_path / "file" / "proofs", "code")
    proofs.keep(b"f" * 32, FINDING, "")

    assert proofs.find(b"f" * 32) is None
    assert "proof not kept" in caplog.text


def test_code_digest_sees_changes(tmp_path: Path) -> None:
    """Another byte, name or file changes the digest."""
    (tmp_path / "a.py").write_text("1")
    seen = {code_digest(tmp_path)}
    (tmp_path / "a.py").write_text("2")
    seen.add(code_digest(tmp_path))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.py").write_text("")
    seen.add(code_digest(tmp_path))

    assert len(seen) == 3


async def test_kept_proof_saves_the_test(tmp_path: Path) -> None:
    """A second start takes the proof of the first; a failed test leaves none, nor is it for another fingerprint or `full`."""
    kept: dict[str, Any] = {"self_test": "kept", "state_dir": tmp_path / "state"}
    failed = await model(fault("fail"), **kept)
    first = await model({}, **kept)
    second = await model(fault("fail"), **kept)
    other = await model(fault("fail") | {"fields": {"device": "other"}}, **kept)
    full = await model(fault("fail"), **(kept | {"self_test": "full"}))

    assert [each.grade for each in (failed, first, second, other, full)] == [
        BEST_EFFORT,
        EXACT,
        EXACT,
        BEST_EFFORT,
        BEST_EFFORT,
    ]
    assert "; proved at " in second.grade_reason
