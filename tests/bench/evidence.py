"""`python -m tests.bench.evidence`: false alarms of the divergence test, and its delay in finding a fault. About a minute."""

from __future__ import annotations

import numpy as np

from tests.sidecar.evidence_paths import NEVER, alarms

PATHS, SEED = 4_000, 20_261_124
CASES = (
    (0.001, 0, 100_000),
    (0.0001, 0, 100_000),
    (0.01, 0, 20_000),
    (0.01, 10_000, 20_000),
    (0.1, 0, 2_000),
    (0.1, 10_000, 2_000),
)


def main() -> None:
    """Prints the table of docs/determinism.md."""
    print(f"{PATHS} paths, seed {SEED}")
    print("| diverge | after clean | observed | alarm raised | after, median | 90 % |")
    for probability, clean, trials in CASES:
        first = alarms(PATHS, clean, trials, probability, SEED)
        up = np.sort(first[first != NEVER])
        share = len(up) / PATHS
        half, most = (str(up[round(q * PATHS) - 1]) if share >= q else "" for q in (0.5, 0.9))
        print(f"| {probability:.2%} | {clean:,} | {trials:,} | {share:.2%} | {half} | {most} |")


if __name__ == "__main__":
    main()
