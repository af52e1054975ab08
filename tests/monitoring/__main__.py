"""`make pictures`: each dashboard of a healthy pair, and two of a pair that diverges and fails."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.monitoring.load import Running, faulty, healthy
from tests.monitoring.names import ROOT, boards
from tests.monitoring.pictures import draw
from tests.monitoring.watch import missing

HEALTHY_SECONDS = 60.0
SECONDS = (45.0, 35.0, 30.0)
PICTURES = ROOT / "docs" / "pictures"


def main() -> int:
    if why := missing():
        print(why)
        return 1
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder, healthy(Path(folder), HEALTHY_SECONDS) as running:
        for name in boards():
            picture(name, name, running, "A scripted engine under load, in health.")
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder, faulty(Path(folder), SECONDS) as running:
        for name in ("overview", "divergence"):
            said = "A scripted engine under load, which diverges and fails as scripted and restarts with another fingerprint."
            picture(name, f"{name}-faulty", running, said)
    return 0


def picture(board: str, name: str, running: Running, what: str) -> None:
    path = PICTURES / f"{name}.png"
    draw(path, boards()[board], running.prometheus, running.start, time.time() - 1, what)
    print(path.relative_to(ROOT), path.stat().st_size, "bytes")


if __name__ == "__main__":
    sys.exit(main())
