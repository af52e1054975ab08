"""Receipts of running programs, as strangers verify them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import Result

from ostinato import errors
from ostinato.cli import show
from ostinato.client import Client
from ostinato.signature import SignedTree, new_key, signer_of
from ostinato.v1 import types_pb2

from tests.e2e.kit import bytes_of, opened, ostinato, scripted
from tests.pair import Pair, python
from tests.waiting import eventually
from tests.web import receiving


@dataclass
class Signed:
    """A pair whose journal is signed."""

    pair: Pair
    folder: Path
    keys: list[str] = field(default_factory=list)
    """Files of public keys of the journal, by name."""
    said: str = ""

    def made_key(self, name: str) -> Path:
        """A new key; its public key is beside it."""
        made = python("-m", "sidecar", "signing-key", str(self.folder / name))
        assert made.returncode == 0, made.stderr
        (self.folder / f"{name}.pub").write_text(made.stdout)
        self.keys.append(name)
        return self.folder / name

    def ostinato(self, *arguments: str, stdin: str = "") -> Result:
        return ostinato("--target", self.pair.target, *arguments, stdin=stdin)

    def verify(self, content: str, *options: str, keys: Sequence[str] | None = None) -> int:
        """The exit code. `keys`: None is all."""
        listed = [each for key in (self.keys if keys is None else keys) for each in ("--key", str(self.folder / f"{key}.pub"))]
        done = self.ostinato("verify", "-", *listed, *options, stdin=content)
        self.said = done.output
        return done.exit_code


@pytest.fixture(scope="module", name="signed")
def _signed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signed]:
    with Pair(service=scripted()) as pair:
        signed = Signed(pair, tmp_path_factory.mktemp("signed"))
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
        [record] = await door.client.get(first.results[1].sequence)
        head = await door.client.head()

    assert bytes_of(again) == bytes_of(first)
    assert record.result.receipt == first.results[1].receipt
    assert first.results[0].receipt.head.key_id != head.signed.key_id
    assert (head.signed.last_index, head.signed.entry_hash) == (head.index, head.entry_hash)
    receipt = json.dumps(show.as_dict(first.results[0].receipt))
    assert [signed.verify(receipt, keys=keys) for keys in ([], ["new"], ["old"], ["old", "new"])] == [3, 3, 0, 0]


async def test_a_log_is_proved_to_its_end(signed: Signed) -> None:
    """All that tail prints, with the head behind it, is proved under the log's key; so is the envelope of head and of get."""
    for prompt in ("a", "b"):
        generate(signed, prompt)
    entries = entries_of(signed)
    head = signed.ostinato("head", "--dsse").stdout

    assert signed.verify(entries + head) == 0, signed.said
    count = entries.count("\n")
    assert f"{count} entries: {count} consistent, {count} chained, {count} signed" in signed.said
    assert signed.verify(signed.ostinato("get", "1", "--dsse").stdout) == 0


def generate(signed: Signed, prompt: str = "a") -> None:
    done = signed.ostinato("generate", prompt, "--max-new-tokens", "2")
    assert done.exit_code == 0, done.output


def entries_of(signed: Signed) -> str:
    return signed.ostinato("--json", "tail", "--payloads").stdout


async def restarted(signed: Signed, *witness: str) -> None:
    """With the same key, and this witness."""
    await asyncio.to_thread(signed.pair.sidecar.stop)
    often = ["--witness-entries", "1", "--witness-seconds", "0.1"]
    key = ["--signing-key", str(signed.folder / "old")]
    sidecar = await asyncio.to_thread(signed.pair.start_sidecar, *key, *witness, *often)
    await asyncio.to_thread(sidecar.wait_for, "engine connected")


async def caught_up(signed: Signed) -> None:
    """The witness has the newest head."""
    async with opened(signed.pair) as door:
        head = await door.client.head()
    await eventually(
        lambda: signed.pair.metrics()["ostinato_witnessed_index"] >= head.index, f"entry {head.index} is witnessed"
    )


async def test_a_file_is_a_witness(signed: Signed) -> None:
    """Heads come to the file. With it a whole journal is proved, and one whose end is cut off is not, though signed. A line
    that a crash has cut spoils none after it."""
    file = signed.folder / "heads.jsonl"
    file.write_bytes(b'{"payload": "')
    await restarted(signed, "--witness", str(file))
    generate(signed)
    head = signed.ostinato("head", "--dsse").stdout
    cut = entries_of(signed) + head
    generate(signed)
    await caught_up(signed)
    whole = entries_of(signed)

    assert signed.verify(whole, "--witness", str(file)) == 0, signed.said
    assert signed.verify(cut) == 0
    assert signed.verify(cut, "--witness", str(file)) == 6


async def test_a_url_is_a_witness_and_may_be_away(signed: Signed) -> None:
    """While the witness answers with errors the door serves, the failures are counted and the lag is shown; when it is well it
    gets the newest head, and verify reads its heads from the URL."""
    kept: list[bytes] = []
    well = threading.Event()

    def take(body: bytes) -> bool:
        if well.is_set():
            kept.append(body)
        return well.is_set()

    with receiving(take, lambda: b"\n".join(kept)) as url:
        await restarted(signed, "--witness", f"{url}/heads")
        generate(signed)
        await eventually(lambda: signed.pair.metrics()["ostinato_witness_failures_total"] > 0, "a failure is counted")
        assert signed.pair.metrics()["ostinato_witness_lag_seconds"] > 0
        well.set()
        await caught_up(signed)

        assert signed.verify(entries_of(signed), "--witness", f"{url}/heads") == 0, signed.said
        assert signed.pair.metrics()["ostinato_witness_lag_seconds"] == 0


async def test_a_second_log_is_a_witness(signed: Signed) -> None:
    """Another sidecar records the heads in its own log, and verify reads them there. It refuses one of another key or log, an
    older one, and one that contradicts what it has; the same head again has the same entry."""
    async with opened(signed.pair) as door:
        log_id = (await door.client.head()).log_id
    public = (signed.folder / "old.pub").read_text().splitlines()[1]
    (signed.folder / "logs").write_text(f"# log key\n{log_id} {public} ours\n")
    with Pair() as other:
        other.start_sidecar("--witness-keys", str(signed.folder / "logs"))
        await restarted(signed, "--witness", other.target)
        async with opened(signed.pair) as door, Client(other.target) as witness:
            old = (await door.client.head()).signed
            generate(signed)
            await caught_up(signed)
            newest = (await door.client.head()).signed
            again = [await witness.witness(newest) for _ in range(2)]
            signer = signer_of((signed.folder / "old").read_bytes())
            fork, later, strange = SignedTree(), SignedTree(), SignedTree()
            fork.sign(log_id, newest.first_index, [bytes(32)] * (newest.last_index - newest.first_index + 1), signer)
            later.sign(log_id, newest.last_index + 1, [bytes(32)], signer_of(new_key()))
            strange.sign("f" * 32, 1, [bytes(32)], signer)
            bad = {"last_index": old, "entry_hash": fork.head, "key_id": later.head, "log_id": strange.head}
            for field, head in bad.items():
                with pytest.raises(errors.InvalidRequest) as refused:
                    await witness.witness(head)
                assert [each.field for each in refused.value.violations] == [f"head.{field}"]
        (signed.folder / "seen").write_text(entries_of(Signed(other, signed.folder)))

        assert again[0] == again[1]
        assert again[0].header.kind == types_pb2.ENTRY_KIND_WITNESSED
        assert other.metrics()["ostinato_witnessed_forks_total"] == 1
        assert signed.verify(entries_of(signed), "--witness", str(signed.folder / "seen")) == 0, signed.said
        other.sidecar.stop()
        assert python("-m", "sidecar", "verify", "--journal", str(other.folder / "journal.sqlite")).returncode == 0


async def test_a_log_without_keys_of_others_is_no_witness(signed: Signed) -> None:
    """A sidecar without --witness-keys says that it is no witness."""
    async with opened(signed.pair) as door:
        with pytest.raises(errors.NotBuilt, match="witness-keys"):
            await door.client.witness((await door.client.head()).signed)
