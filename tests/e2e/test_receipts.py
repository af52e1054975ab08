"""Receipts of running programs, as strangers verify them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ostinato.cli import show

from tests.e2e.kit import bytes_of, opened
from tests.pair import Pair, environment, python


@dataclass
class Signed:
    """A pair whose journal is signed."""

    pair: Pair
    folder: Path

    def made_key(self, name: str) -> Path:
        """A new key; its public key is beside it."""
        made = python("-m", "sidecar", "signing-key", str(self.folder / name))
        assert made.returncode == 0, made.stderr
        (self.folder / f"{name}.pub").write_text(made.stdout)
        return self.folder / name

    def ostinato(self, *arguments: str, input_: str = "") -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "ostinato.cli", "--target", self.pair.target, *arguments]
        return subprocess.run(line, env=environment(), input=input_, capture_output=True, text=True, check=False)

    def verify(self, content: str, *keys: str) -> tuple[int, str]:
        options = [each for key in keys for each in ("--key", str(self.folder / f"{key}.pub"))]
        done = self.ostinato("verify", "-", *options, input_=content)
        return done.returncode, done.stdout


@pytest.fixture(name="signed")
def _signed(tmp_path: Path) -> Iterator[Signed]:
    with Pair() as pair:
        signed = Signed(pair, tmp_path)
        pair.start_service()
        pair.start_sidecar("--signing-key", str(signed.made_key("old"))).wait_for("engine connected")
        yield signed


async def test_a_receipt_stays_the_same(signed: Signed) -> None:
    """After a restart with another key an answer comes back byte for byte, and Get has its receipt. The old public key still
    verifies it."""
    async with opened(signed.pair) as door:
        first = await door.client.generate(["a", "b"], key="signed", max_new_tokens=3)
    await asyncio.to_thread(signed.pair.sidecar.stop)
    sidecar = await asyncio.to_thread(signed.pair.start_sidecar, "--signing-key", str(signed.made_key("new")))
    await asyncio.to_thread(sidecar.wait_for, "engine connected")
    async with opened(signed.pair) as door:
        again = await door.client.generate(["a", "b"], key="signed", max_new_tokens=3)
        [record] = await door.client.get(2)
        head = await door.client.head()

    assert bytes_of(again) == bytes_of(first)
    assert record.result.receipt == first.results[1].receipt
    assert first.results[0].receipt.head.key_id != head.signed.key_id
    assert (head.signed.last_index, head.signed.entry_hash) == (head.index, head.entry_hash)
    receipt = json.dumps(show.as_dict(first.results[0].receipt))
    assert [signed.verify(receipt, *keys)[0] for keys in ((), ("new",), ("old",), ("old", "new"))] == [3, 3, 0, 0]


async def test_a_log_is_proved_to_its_end(signed: Signed) -> None:
    """All that tail prints, with the head behind it, is proved under the log's key; so is the envelope of head and of get."""
    for prompt in ("a", "b"):
        assert signed.ostinato("generate", prompt, "--max-new-tokens", "2").returncode == 0
    entries = signed.ostinato("--json", "tail", "--payloads").stdout
    head = signed.ostinato("head", "--dsse").stdout

    code, said = signed.verify(entries + head, "old")
    count = entries.count("\n")
    assert (code, f"{count} entries: {count} consistent, {count} chained, {count} signed" in said) == (0, True), said
    assert signed.verify(signed.ostinato("get", "1", "--dsse").stdout, "old")[0] == 0
