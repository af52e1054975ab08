"""What `ostinato generate --output` holds of a long file, and how fast it goes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.memory import Memory
from tests.bench.table import Table, count
from tests.pair import Pair

BATCH, CONCURRENCY, TOKENS = 32, 4, 16
FEW = 1_000


@dataclass(frozen=True, slots=True)
class Run:
    """One command, from its start to its end."""

    seconds: float
    peak_mb: float
    summary: dict[str, object]


def run(pair: Pair, file: Path) -> Run:
    command = [sys.executable, "-m", "ostinato.cli", "--target", pair.target, "--json", "generate", "--file", str(file)]
    command += ["--output", str(file.with_suffix(".answers")), "--batch", str(BATCH), "--concurrency", str(CONCURRENCY)]
    command += ["--max-new-tokens", str(TOKENS), "--ignore-eos"]
    begun, peak = time.monotonic(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            # Looked at while it lasts: the peak that wait4 tells of a child counts what this process held when it was forked.
            with contextlib.suppress(OSError, KeyError):  # it has ended
                peak = max(peak, Memory.of(process.pid).peak)
            time.sleep(0.02)
        assert process.stdout is not None
        summary = json.load(process.stdout)
    assert process.returncode == 0, summary
    return Run(time.monotonic() - begun, peak, summary)


def measure(lines: int) -> Table:
    """Of few lines and of many, and of many whose answers are there."""
    note = (
        f"Unseeded lines of 200 characters, {TOKENS} tokens each, scripted engine; batches of {BATCH}, {CONCURRENCY} at once."
    )
    table = Table("Bulk runs", ["lines", "seconds", "peak resident MB"], note)
    with Pair() as pair:
        pair.start()
        for name, number in (("few", FEW), ("many", lines), ("many", lines)):
            file = pair.folder / f"{name}.jsonl"
            if not file.exists():
                with file.open("w") as out:
                    out.writelines(f"{json.dumps(f'Prompt {each} '.ljust(200, '.'))}\n" for each in range(number))
            done = run(pair, file)
            assert done.summary["items"] == number
            what = " (all kept)" if done.summary["kept"] else ""
            table.rows.append([f"{number:,}{what}", f"{done.seconds:.1f}", count(done.peak_mb)])
    return table
