"""Start both programs, ask a few batches, show and check the answers, stop."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import ostinato
from ostinato.chain import check_result
from ostinato.cli.serve import Serving, run_until_signal, started
from ostinato.digest import output_digest
from ostinato.v1 import types_pb2

from tests.pair import ROOT, samples

STATE = ROOT / ".run" / "service"
"""Proofs of the self-test stay here, so that a second start is quick."""
ANYWHERE = "127.0.0.1:0"


def main() -> int:
    """0: everything that was shown is as promised."""
    with tempfile.TemporaryDirectory(prefix="ostinato-demo-") as folder:  # a new journal: sequences begin at 1
        serving = Serving(
            state=Path(folder),
            flags={
                "service": ["--engine", "llama", "--state-dir", str(STATE), "--metrics", ANYWHERE],
                "sidecar": ["--listen", ANYWHERE, "--metrics", ANYWHERE, "--journal-reserve-bytes", str(1 << 20)],
            },
        )
        return asyncio.run(run_until_signal("demo", serving, demo(serving)))


async def demo(serving: Serving) -> int:
    """The exit code."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    async with started(serving):
        connected = serving.connected
        console.print(
            f"engine [bold]{connected['model']}[/] at grade [bold]{str(connected['grade']).upper()}[/], "
            f"ready after {serving.seconds:.1f} s; fingerprint {connected['fingerprint']}"
        )
        promises = await show(serving.target, console)
        console.print(await asyncio.to_thread(counted, serving.ports["sidecar"]))
    return 0 if promises else 1


PROMPT = "Shanghai is"
WIDTHS = {"": 18, "sequence": 8, "seed": 20, "grade": 11, "output": 12, "ms": 5}
"""Columns and their characters; the text has what is left of a line."""
WIDE_CHARACTERS = 120
"""Of a terminal's line that has room for every column."""
TRAFFIC = (
    "The capital of France is",
    "Once upon a time there was a lighthouse keeper who",
    "def fibonacci(n):",
    "The three laws of robotics are",
    "In the year 2150,",
    "A recipe for bread:",
)


async def show(target: str, console: Console) -> bool:
    """Whether everything came as promised from a new sidecar at this address."""
    async with ostinato.Client(target) as client:
        seeded = await ask(client, 3, seed=1)
        unseeded = await ask(client, 3, seed=None)
        among = await among_traffic(client)
        console.print(table(seeded, unseeded, among, console.width))
        replayed = [verdict.comparison.verdict async for verdict in client.replay(1, unseeded[-1].sequence)]
    outputs = {output_digest(result.output) for result in (*seeded, *among)}
    promises = {
        "one seed, one answer: alone in a batch of equals and among other traffic": len(outputs) == 1,
        "no seed, three answers": len({output_digest(result.output) for result in unseeded}) == 3,
        "every receipt verifies offline": not any(check_result(result) for result in (*seeded, *unseeded, *among)),
        "sequences are 1, 2, 3, ...": sorted(r.sequence for r in (*seeded, *unseeded)) == [1, 2, 3, 4, 5, 6],
        "replayed from the journal: equal": set(replayed) == {types_pb2.VERDICT_MATCH},
    }
    for promise, kept in promises.items():
        console.print(f"  [green]✓[/] {promise}" if kept else f"  [red]✗ {promise}[/]", highlight=False)
    return all(promises.values())


async def ask(client: ostinato.Client, copies: int, seed: int | None) -> Sequence[types_pb2.Result]:
    """The prompt, `copies` times in one batch."""
    return (await client.generate([PROMPT] * copies, seed=seed, top_k=40, max_new_tokens=16)).results


async def among_traffic(client: ostinato.Client) -> Sequence[types_pb2.Result]:
    """The seeded prompt again, among other requests."""

    async def other(number: int, prompt: str) -> None:
        await asyncio.sleep(0.05 * number)
        await client.generate(prompt, temperature=0.5 + 0.2 * number, top_p=0.9, max_new_tokens=8 + 6 * number)

    others = [asyncio.create_task(other(number, prompt)) for number, prompt in enumerate(TRAFFIC)]
    await asyncio.sleep(0.2)
    answer = await ask(client, 1, seed=1)
    await asyncio.gather(*others)
    return answer


def table(
    seeded: Sequence[types_pb2.Result], unseeded: Sequence[types_pb2.Result], among: Sequence[types_pb2.Result], width: int
) -> Table:
    """One row an answer; all columns if there are enough characters in a line."""
    left_out = {"seed", "grade", "ms"} if width < WIDE_CHARACTERS else set()
    shown = {name: characters for name, characters in WIDTHS.items() if name not in left_out}
    made = Table(title=f"\n{PROMPT!r}, top_k 40", title_justify="left", title_style="bold")
    for name, characters in shown.items():
        made.add_column(name, justify="right" if name in ("sequence", "seed", "ms") else "left", width=characters)
    made.add_column("text", no_wrap=True, width=width - sum(shown.values()) - 3 * len(shown) - 4)
    for label, results in (("seed 1", seeded), ("no seed", unseeded), ("seed 1, in traffic", among)):
        for result in results:
            cells = {
                "": label,
                "sequence": str(result.sequence),
                "seed": str(result.output.seed),
                "grade": types_pb2.Grade.Name(result.output.grade).removeprefix("GRADE_"),
                "output": output_digest(result.output).hex()[:12],
                "ms": f"{result.timing.total_micros / 1000:.0f}",
                "text": repr(result.output.text),
            }
            made.add_row(*(Text(cell) for name, cell in cells.items() if name not in left_out))
        made.add_section()
    return made


def counted(port: int) -> str:
    """What the sidecar's metrics say, and how to have a pair that stays."""
    wanted = ("ostinato_ended_items_total", "ostinato_comparisons_total", "ostinato_collision", "ostinato_last_sequence")
    shown = [
        f"  {name} {value:g}"
        for name, value in sorted(samples(port).items())
        if name.startswith(wanted) and not name.split("{")[0].endswith("_created")
    ]
    return "\n".join(
        ["\nthe sidecar's metrics", *shown, "\nBoth programs have ended. `make up` starts them and leaves them running."]
    )
