"""Start both programs, ask a few batches, check what came of them, stop."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from ostinato.cli.serve import Running, Wanted, run_until_signal, started

from tests.demo.show import counted, show
from tests.pair import ROOT

STATE = ROOT / ".run" / "service"
"""Proofs of the self-test stay here, so that a second start is quick."""
ANYWHERE = "127.0.0.1:0"


def main() -> int:
    """0: everything that was shown is as promised."""
    return asyncio.run(run_until_signal("demo", demo))


async def demo(running: Running) -> int:
    """The exit code. The journal is a new one, so that sequences begin at 1."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    with tempfile.TemporaryDirectory(prefix="ostinato-demo-") as folder:
        wanted = Wanted(
            state=Path(folder),
            listen=ANYWHERE,
            metrics=ANYWHERE,
            service_metrics=ANYWHERE,
            service=["--engine", "llama", "--state-dir", str(STATE)],
            sidecar=["--journal-reserve-bytes", str(1 << 20)],
        )
        async with started(wanted, running):
            connected = running.connected
            console.print(
                f"engine [bold]{connected['model']}[/] at grade [bold]{str(connected['grade']).upper()}[/], "
                f"ready after {running.seconds:.1f} s; fingerprint {connected['fingerprint']}"
            )
            promises = await show(running.target, console)
            console.print(await asyncio.to_thread(counted, running.ports["sidecar"]))
    return 0 if promises else 1
