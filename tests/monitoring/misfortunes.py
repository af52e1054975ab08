"""A pair to which all goes wrong that an alert is for, one thing after the other, while Prometheus and Alertmanager watch."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import grpc
import yaml

from ostinato.client import Client
from ostinato.v1 import engine_pb2, engine_pb2_grpc

from tests.certificates import Authority
from tests.monitoring.names import alerts
from tests.monitoring.tour import SERVICE, SIDECAR, Sort, calling, connected, port
from tests.monitoring.watch import RULES, Prometheus, Webhook, aim, until, watching
from tests.pair import Pair

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
"""Seconds, for a busy machine: what is waited for comes in a few."""
IN_THE_TOUR = {"OstinatoDiverged", "OstinatoDivergenceAlarm", "OstinatoDrift"}
"""test_watch.py has these, as they are, unhurried."""
PERIOD = "500ms"
ROOM_BYTES = 1 << 20
"""That a journal is left, of which a quarter is held back."""


def hurried(folder: Path) -> Path:
    """The rules, but that an alert is not waited for, and that order has stalled when it has for two seconds."""
    rules = yaml.safe_load(RULES.read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        if "for" in rule:
            rule["for"] = PERIOD
        if rule.get("alert") == "OstinatoOrderStalled":
            rule["expr"] = rule["expr"].replace("[5m]", "[2s]")
    path = folder / "hurried.yaml"
    path.write_text(yaml.safe_dump(rules))
    return path


@contextlib.contextmanager
def suffering(folder: Path) -> Iterator[Webhook]:
    """What Alertmanager has said when all of it is over."""
    authority = Authority(folder)
    certificate, key = authority.sign("sidecar", days=5)
    flags = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    flags += ["--audit-rate", "1", "--audit-patience-seconds", "0", "--queue-items-max", "4"]
    with Pair(service=["--script", json.dumps(FAULTY)], sidecar=flags) as pair:
        pair.env["LD_PRELOAD"] = str(_slow_disk(folder))
        pair.start()
        targets: dict[str, Callable[[], int]] = {SIDECAR: lambda: port(pair.sidecar), SERVICE: lambda: port(pair.service)}
        with watching(folder, targets, hurried(folder), PERIOD) as (prometheus, webhook):
            world = World(pair, authority, prometheus, webhook, lambda: aim(folder, {job: at() for job, at in targets.items()}))
            world.is_well()
            world.loses_what_it_has(certificate)
            world.answers_badly()
            world.is_flooded()
            authority.sign("sidecar", days=5)  # without it, nothing starts
            world.has_no_engine()
            world.stalls()
            world.has_no_room()
            yield webhook


@dataclass(frozen=True)
class World:
    """What happens in it, in this order. What goes on being true behind it is only waited for until it fires."""

    pair: Pair
    authority: Authority
    prometheus: Prometheus
    webhook: Webhook
    aim: Callable[[], None]
    """Prometheus at where the programs are now."""

    def is_well(self) -> None:
        """Else nothing could be lost."""
        self._until("ostinato_engine_grade == 3 and ostinato_collisions_total == 0")

    def loses_what_it_has(self, certificate: Path) -> None:
        """A certificate that can be read; the one in force expires in days."""
        certificate.write_text("half a rotation")

    def answers_badly(self) -> None:
        """Two seeds, one answer; no audit ends well; a grade falls; and the disk is slow, from the start on."""
        with self._calling([(_calm, 0.1)]):
            self._fires(
                "OstinatoCollision", "OstinatoNotCompared", "OstinatoGradeLost", "OstinatoJournalSlow",
                "OstinatoCertificateExpires", "OstinatoCredentialsUnusable",
            )  # fmt: skip
        self.pair.env.clear()

    def is_flooded(self) -> None:
        """Ten at once, where two run and four wait, and none has the time that its answer takes."""
        with self._calling([(_flood, 0.3)] * 10):
            self._fires(
                "OstinatoQueueSaturated", "OstinatoDeadlineMisses", "OstinatoErrorBudgetBurnsFast",
                "OstinatoErrorBudgetBurnsSlow",
            )  # fmt: skip

    def has_no_engine(self) -> None:
        """Something at its address that is no service, and a sidecar that starts twice meanwhile."""
        self.pair.service.kill()
        with _impolite(self.pair.engine_address):
            self._start_again()
            self._start_again()
            self._fires("OstinatoEngineFaults")
            self._told("OstinatoDown", "OstinatoEngineDown")

    def stalls(self) -> None:
        """An engine that makes nothing, and twice as many callers as it is given at once."""
        self.pair.start_service("--script", json.dumps(HANGING)).wait_for("serving")
        self.aim()
        with self._calling([(_patient, 0.3)] * 8):
            self._told("OstinatoOrderStalled")

    def has_no_room(self) -> None:
        """The third start, with a journal that may grow by little, and an engine that lets it."""
        self.pair.service.kill()
        self.pair.start_service().wait_for("serving")
        self.pair.sidecar.kill()
        with contextlib.closing(apsw.Connection(str(self.pair.folder / "journal.sqlite"))) as db:
            most = db.pragma("page_count") * db.pragma("page_size") + ROOM_BYTES
        self._start_again("--journal-reserve-bytes", str(ROOM_BYTES // 4), "--journal-bytes-max", str(most))
        with self._calling([(_wordy, 0.01)]):
            self._told(*(name for name in alerts() if name not in IN_THE_TOUR))

    def _start_again(self, *flags: str) -> None:
        self.pair.sidecar.kill()
        self.pair.start_sidecar(*flags)
        self.aim()

    def _calling(self, sorts: Sequence[Sort]) -> contextlib.AbstractContextManager[None]:
        return calling(lambda: connected(self.pair, self.authority), sorts)

    def _until(self, query: str) -> None:
        until(lambda: bool(self.prometheus.now(query)), query, LATE)

    def _fires(self, *names: str) -> None:
        for name in names:
            self._until(f'ALERTS{{alertname="{name}",alertstate="firing"}}')

    def _told(self, *names: str) -> None:
        until(lambda: all(self.webhook.heard(name) for name in names), f"the webhook hears of {', '.join(names)}", LATE)


async def _calm(client: Client) -> None:
    await client.generate(["A phrase that repeats"] * 2, max_new_tokens=128, ignore_eos=True)


async def _flood(client: Client) -> None:
    await client.generate("Too much, too soon", max_new_tokens=4000, ignore_eos=True, timeout=1)


async def _wordy(client: Client) -> None:
    await client.generate([[65] * 3000] * 4, max_new_tokens=1)


async def _patient(client: Client) -> None:
    await client.generate("Whenever you can", max_new_tokens=8)


class _Impolite(engine_pb2_grpc.EngineServicer):
    """No Welcome."""

    Describe: Any = None
    Prepare: Any = None
    Tokenize: Any = None
    GetTokenizer: Any = None

    def Execute(self, requests: Any, context: Any) -> Iterator[engine_pb2.ExecuteResponse]:
        yield engine_pb2.ExecuteResponse()


@contextlib.contextmanager
def _impolite(address: str) -> Iterator[None]:
    server = grpc.server(ThreadPoolExecutor(2))
    engine_pb2_grpc.add_EngineServicer_to_server(_Impolite(), server)
    server.add_insecure_port(address)
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait()


def _slow_disk(folder: Path) -> Path:
    """A library that makes every flush to the disk take 0.15 s longer."""
    source, library = folder / "slow.c", folder / "slow.so"
    source.write_text(SLOW_DISK)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, source], check=True)
    return library
