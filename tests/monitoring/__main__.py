"""`make pictures`: a pair under load for a while, and each dashboard as it was then."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.monitoring.names import ROOT, boards
from tests.monitoring.pictures import draw
from tests.monitoring.tour import touring
from tests.monitoring.watch import missing

SECONDS = (45.0, 35.0, 30.0)


def main() -> int:
    """The exit code."""
    if why := missing():
        print(why)
        return 1
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder, touring(Path(folder), SECONDS) as tour:
        for name, board in boards().items():
            path = ROOT / "docs" / "pictures" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            draw(path, board, tour.prometheus, tour.start, time.time() - 1)
            print(path.relative_to(ROOT), path.stat().st_size, "bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
