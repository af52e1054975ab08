"""`python -m tests.gpu.tp MODEL`: two GPUs that share the model, compared with one. Exit code 2 if there are not two."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from tests.gpu.plan import Plan, arguments, conclude, names, plan_of, why
from tests.gpu.rows import measure

ROWS = (
    ("one GPU", ""),
    ("nccl", "--tp 2 --communicator nccl"),
    ("nccl again", "--tp 2 --communicator nccl"),
    ("cuda-ipc", "--tp 2 --communicator cuda-ipc"),
    ("cuda-ipc again", "--tp 2 --communicator cuda-ipc"),
    ("stock nccl", "--tp 2 --communicator nccl --no-exact --self-test off"),
)


async def check(plan: Plan, chosen: Sequence[str]) -> None:
    """Runs each row, and compares the answers of equal settings."""
    digests: dict[str, str] = {}
    for title, flags in ROWS:
        if chosen and title not in chosen:
            continue
        if plan.late():
            plan.lines.append(f"{title:14} no time")
            continue
        own = plan.anew(*(flags.split() if plan.engine == "turbomind" else ()))
        own.bad = plan.bad
        try:
            reference, line = await measure(own, title)
        except Exception as error:  # noqa: BLE001  # the other rows are worth having
            plan.tell(f"{title:14} CANNOT: {why(error)}")
            continue
        plan.tell(line)
        digests[title] = reference.digest
        first = title.removesuffix(" again")
        if first != title and digests.get(first) != reference.digest:
            plan.bad.append(f"{first}: {digests.get(first)} in one process, {reference.digest} in another")
    alike = {title: digest == digests.get("one GPU") for title, digest in digests.items() if title != "one GPU"}
    plan.tell(f"digests as of one GPU (other numbers are no fault): {alike}")


def gpus() -> int:
    """The GPUs that torch finds, in another process, because torch keeps them open."""
    told = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], capture_output=True, text=True, check=False
    )
    return int(told.stdout) if told.stdout.strip().isdecimal() else 0


def main() -> None:
    parser = arguments("python -m tests.gpu.tp")
    parser.set_defaults(totals=(2, 8, 32, 128, 256), seconds=480.0)
    parser.add_argument("--rows", type=names, default=(), help=f"of {', '.join(title for title, _ in ROWS)}; none: all")
    given, began = parser.parse_args(), time.monotonic()
    if given.engine == "turbomind" and (found := gpus()) < 2:
        print(f"tensor parallelism is not looked at: that takes two GPUs, and here torch finds {found}")
        sys.exit(2)
    with tempfile.TemporaryDirectory(prefix="ostinato-state-") as state:
        plan = plan_of(given, state)
        asyncio.run(check(plan, given.rows))
        code = conclude(began, plan)
    os._exit(code)


if __name__ == "__main__":
    main()
