"""`python -m tests.demo`."""

import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C amid the imports ends it without a traceback

from tests.demo.show import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
