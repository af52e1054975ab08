"""`make pictures`: each dashboard of a pair in health, then those of a pair that diverges and fails."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.monitoring.names import ROOT, boards
from tests.monitoring.pictures import draw
from tests.monitoring.tour import Tour, healthy, touring
from tests.monitoring.watch import missing

HEALTHY_SECONDS = 60.0
SECONDS = (45.0, 35.0, 30.0)
PICTURES = ROOT / "docs" / "pictures"


def main() -> int:
    """The exit code."""
    if why := missing():
        print(why)
        return 1
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder, healthy(Path(folder), HEALTHY_SECONDS) as tour:
        for name in boards():
            picture(name, name, tour, "A scripted engine under load, in health.")
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder, touring(Path(folder), SECONDS) as tour:
        for name in ("overview", "divergence"):
            said = "A scripted engine under load, which diverges and fails as scripted and restarts with another fingerprint."
            picture(name, f"{name}-faulty", tour, said)
    return 0


def picture(board: str, name: str, tour: Tour, what: str) -> None:
    """Draw this dashboard to docs/pictures."""
    path = PICTURES / f"{name}.png"
    draw(path, boards()[board], tour.prometheus, tour.start, time.time() - 1, what)
    print(path.relative_to(ROOT), path.stat().st_size, "bytes")


if __name__ == "__main__":
    sys.exit(main())
