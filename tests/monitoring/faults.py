"""A pair with a fault for each alert, one after the other, under Prometheus and Alertmanager."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw
import yaml

from ostinato import errors
from ostinato.client import Client
from ostinato.signature import SignedTree, Signer, new_key, signer_of
from ostinato.v1 import engine_pb2

from tests.engine import Fake, served
from tests.monitoring.load import Running, watched
from tests.monitoring.names import alerts
from tests.monitoring.watch import RULES, Webhook
from tests.pair import Pair
from tests.waiting import apart, until

COMPILER = "cc"
SLOW_DISK = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>
static int slowly(long number, int file) { usleep(150000); return syscall(number, file); }
int fsync(int file) { return slowly(SYS_fsync, file); }
int fdatasync(int file) { return slowly(SYS_fdatasync, file); }
"""
FAULTY = {
    "runs": 2,
    "delay_seconds": 0.001,
    "rules": [
        {"do": "forget_seed", "purposes": ["PRIMARY"]},
        {"do": "fail", "purposes": ["AUDIT"]},
        {"do": "lose_grade", "at": 1, "sequences": [9]},
    ],
}
HANGING = {"runs": 2, "rules": [{"do": "hang"}]}
LATE = 120.0
"""Seconds, for a busy machine; usually a few are enough."""
IN_TEST_WATCH = {"OstinatoDiverged", "OstinatoDivergenceAlarm", "OstinatoDrift"}
"""test_watch.py tests these with unchanged rules."""
PERIOD = "250ms"
OTHER_LOG, NO_WITNESS = "f" * 32, "http://127.0.0.1:1/"
ROOM_BYTES = 1 << 20
"""Space that is left for the journal, a quarter of it as reserve."""


def fast_rules(folder: Path) -> Path:
    """The rules with short waiting times, and two seconds for OstinatoOrderStalled and OstinatoWitnessBehind."""
    rules = yaml.safe_load(RULES.read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        if "for" in rule:
            rule["for"] = PERIOD
        if rule.get("alert") == "OstinatoOrderStalled":
            rule["expr"] = rule["expr"].replace("[5m]", "[2s]")
        if rule.get("alert") == "OstinatoWitnessBehind":
            rule["expr"] = rule["expr"].replace("900", "2")
    path = folder / "fast_rules.yaml"
    path.write_text(yaml.safe_dump(rules))
    return path


@contextlib.contextmanager
def with_faults(folder: Path) -> Iterator[Webhook]:
    """The webhook, after all faults."""
    signer = signer_of(key_pem := new_key())
    (folder / "signing.pem").write_bytes(key_pem)
    (folder / "signing.pem").chmod(0o600)
    (folder / "logs").write_text(f"{OTHER_LOG} {signer.public_pem.splitlines()[1]}\n")
    flags = ["--signing-key", str(folder / "signing.pem"), "--witness", NO_WITNESS, "--witness-keys", str(folder / "logs")]
    flags += ["--audit-rate", "1", "--audit-patience-seconds", "0", "--queue-items-max", "4"]
    rules, library = fast_rules(folder), _slow_disk(folder)
    with watched(folder, FAULTY, *flags, days=5, library=library, rules=rules, period=PERIOD) as running:
        faults = Faults(running)
        faults.wait_until_healthy()
        faults.fork_a_log(signer)
        faults.break_certificate(folder / "sidecar.pem")
        faults.give_wrong_answers()
        faults.overload()
        running.authority.sign("sidecar", days=5)  # without it, nothing starts
        faults.lose_engine()
        faults.stall()
        faults.fill_journal()
        yield running.webhook


@dataclass(frozen=True)
class Faults:
    """The faults, to be called in this order. For an alert that keeps firing, a step waits only until it fires."""

    running: Running

    @property
    def pair(self) -> Pair:
        return self.running.pair

    def wait_until_healthy(self) -> None:
        """A grade that can be lost, and a counter that can increase."""
        self.running.reached("ostinato_engine_grade == 3 and ostinato_collisions_total == 0")
        self.running.webhook.alerts.clear()  # of the start

    def fork_a_log(self, signer: Signer) -> None:
        """Another log shows two of its entries as the first one. The witness of this log is never there."""

        async def show() -> None:
            async with self.running.client() as client:
                for entry_hash in (bytes(32), b"1" * 32):
                    tree = SignedTree()
                    tree.sign(OTHER_LOG, 1, [entry_hash], signer)
                    with contextlib.suppress(errors.InvalidRequest):
                        await client.witness(tree.head)

        asyncio.run(show())
        self._until_firing("OstinatoWitnessedFork", "OstinatoWitnessBehind")

    def break_certificate(self, certificate: Path) -> None:
        """An unreadable certificate; the one in force expires in days."""
        certificate.write_text("half a rotation")

    def give_wrong_answers(self) -> None:
        """Collisions, failing audits, a lower grade, and a disk that is slow from the start on."""
        with self.running.calling([(_unseeded, 0.1)]):
            self._until_firing(
                "OstinatoCollision", "OstinatoNotCompared", "OstinatoGradeLost", "OstinatoJournalSlow",
                "OstinatoCertificateExpires", "OstinatoCredentialsUnusable",
            )  # fmt: skip
        self.pair.env.clear()

    def overload(self) -> None:
        """Ten callers where two items run and four wait, with deadlines shorter than their answers."""
        with self.running.calling([(_impatient, 0.3)] * 10):
            self._until_firing(
                "OstinatoQueueSaturated", "OstinatoDeadlineMisses", "OstinatoErrorBudgetBurnsFast",
                "OstinatoErrorBudgetBurnsSlow",
            )  # fmt: skip

    def lose_engine(self) -> None:
        """A server at the engine's address that violates the protocol, and two restarts of the sidecar."""
        self.pair.service.kill()
        with apart(served(Fake(welcomes=[engine_pb2.ExecuteResponse()] * 1000), self.pair.engine_address)):
            self._start_again()
            self._start_again()
            self._until_firing("OstinatoEngineFaults")
            self._until_received("OstinatoDown", "OstinatoEngineDown")

    def stall(self) -> None:
        """An engine that makes no tokens, and twice as many callers as it has runs."""
        self.pair.start_service("--script", json.dumps(HANGING)).wait_for("serving")
        with self.running.calling([(_patient, 0.3)] * 8):
            self._until_received("OstinatoOrderStalled")

    def fill_journal(self) -> None:
        """A third restart, with little space for the journal, and a working engine."""
        self.pair.service.kill()
        self.pair.start_service().wait_for("serving")
        self.pair.sidecar.kill()
        with contextlib.closing(apsw.Connection(str(self.pair.folder / "journal.sqlite"))) as db:
            most = db.pragma("page_count") * db.pragma("page_size") + ROOM_BYTES
        self._start_again("--journal-reserve-bytes", str(ROOM_BYTES // 4), "--journal-bytes-max", str(most))
        with self.running.calling([(_large, 0.01)]):
            self._until_received(*(name for name in alerts() if name not in IN_TEST_WATCH))

    def _start_again(self, *flags: str) -> None:
        self.pair.sidecar.kill()
        self.pair.start_sidecar(*flags)

    def _until_firing(self, *names: str) -> None:
        for name in names:
            self.running.reached(f'ALERTS{{alertname="{name}",alertstate="firing"}}')

    def _until_received(self, *names: str) -> None:
        until(
            lambda: all(self.running.webhook.received(name) for name in names), f"the webhook hears of {', '.join(names)}", LATE
        )


async def _unseeded(client: Client) -> None:
    await client.generate(["A phrase that repeats"] * 2, max_new_tokens=128, ignore_eos=True)


async def _impatient(client: Client) -> None:
    await client.generate("Too much, too soon", max_new_tokens=4000, ignore_eos=True, timeout=1)


async def _large(client: Client) -> None:
    await client.generate([[65] * 3000] * 4, max_new_tokens=1)


async def _patient(client: Client) -> None:
    await client.generate("Whenever you can", max_new_tokens=8)


def _slow_disk(folder: Path) -> Path:
    """A library that delays every fsync by 0.15 s."""
    source, library = folder / "slow.c", folder / "slow.so"
    source.write_text(SLOW_DISK)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, source], check=True)
    return library
