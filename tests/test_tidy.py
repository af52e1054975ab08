"""Rules that a program can check: which module may import which, the length of functions, words that the repository avoids."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FUNCTION_LINES_MAX = 70
SPINE_LINES_MAX = 5_500
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")


@dataclass(frozen=True)
class Only:
    """Modules `what` may be imported by the product's files that match `by`, and by no other."""

    what: tuple[str, ...]
    by: str
    why: str


ARROWS = (
    Only(("service",), r"service/", "the contract and the sidecar know no service"),
    Only(("sidecar",), r"sidecar/", "the contract and the service know no sidecar"),
    Only(("tests",), r"tests/", "the product knows no test"),
    Only(("lmdeploy",), r"service/engines/turbomind", "one engine, one room"),
    Only(("xllamacpp",), r"service/engines/llama/library\.py", "its binding changes with every release"),
    Only(("apsw", "sqlite3"), r"sidecar/journal/sqlite\.py", "one file per database driver"),
    Only(("psycopg",), r"sidecar/journal/postgres\.py", "one file per database driver"),
    Only(("smg_grpc_proto",), r"sidecar/gateway\.py", "an extra, for those who want that face"),
    Only(("matplotlib",), r"proto/ostinato/cli/charts\.py", "an extra of the wheel, and slow to import"),
    Only(("opentelemetry",), r"proto/ostinato/tracing\.py", "an extra of the wheel, off by default"),
    Only(("serving",), r"proto/serving/|service/|sidecar/", "a client does not serve"),
)

BESIDE_THE_SPINE = {
    "ostinato.compare": "two runs, one verdict",
    "ostinato.errors": "the errors, and their form on the wire",
    "ostinato.signature": "signed heads, and the proof that they cover a receipt",
    "ostinato.resume": "how much of an item was sent",
    "ostinato.tracing": "spans",
    "ostinato.v1": "generated from the contract",
    "serving": "gRPC servers: credentials, errors, settings",
    "service.cases": "the prompts of the self-test",
    "service.chat": "chats to text",
    "service.engines.huggingface": "a tokenizer's files",
    "service.outbox": "what waits to be written, joined into messages",
    "service.prepare": "from a prompt to token ids",
    "service.parse": "what an output's text holds",
    "service.proofs": "the self-test's results, kept for the next start",
    "service.config": "settings",
    "service.description": "the answer of Describe",
    "service.observe": "metrics and spans",
    "sidecar.admission": "what can refuse a request before it has a number",
    "sidecar.answers": "the calls that wait for items",
    "sidecar.core.fairness": "the queue before the numbers",
    "sidecar.core.reruns": "runs without numbers",
    "sidecar.collisions": "a kind of comparison",
    "sidecar.config": "settings",
    "sidecar.fingerprints": "a cache of fingerprints by digest",
    "sidecar.held": "bounds of the bytes that wait for readers",
    "sidecar.observe": "metrics, spans and log lines",
    "sidecar.quota": "bytes of the journal by tenant",
    "sidecar.rerun": "second runs",
    "sidecar.turns": "turns between tenants for long work",
}
"""What the spine may use of ours beside itself. To understand order, journal and exactness, none of it has to be read."""

CLIENT = re.compile(r"proto/ostinato/")
CLIENT_EXTRAS = {"cryptography", "opentelemetry", "matplotlib"}
CLIENT_MAY_IMPORT = sys.stdlib_module_names | CLIENT_EXTRAS | {"google", "grpc", "grpc_status", "ostinato", "rich", "typer"}


# Of no use to a reader of the repository. The patterns do not match themselves.
UNSAID = {
    "a number of a tracker": r"\b[Ii]ssues? #\d",
    "a path of one machine": r"(?<![\w.])/[w]ork/(?:main|shared|\.)|/[r]oot/",
    "a registry's host": r"py[p]i\.org|python[h]osted|npm[j]s\.|deb\.[d]ebian|[g]hcr\.io|[q]uay\.io|registry-1\.[d]ocker",
}


@cache
def files() -> tuple[Path, ...]:
    """Every file of the repository that git would keep, relative to its root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    return tuple(path for name in listed.stdout.decode().split("\0") if name and (ROOT / (path := Path(name))).is_file())


def python(*tops: str) -> Iterator[Path]:
    """Written (not generated) Python under these folders."""
    return (path for path in files() if path.suffix == ".py" and path.parts[0] in tops and not GENERATED.search(path.name))


def product() -> Iterator[Path]:
    """The programs and the contract."""
    return python("proto", "service", "sidecar")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, at its top or deeper."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions of a file, methods and inner ones included."""
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def within(name: str, modules: tuple[str, ...]) -> bool:
    """Whether `name` is one of these modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_imports_follow_the_arrows() -> None:
    """Every import follows the arrows."""
    wrong = [
        f"{path}:{line} imports {name}: {arrow.why}"
        for path in product()
        for line, name in imported(path)
        for arrow in ARROWS
        if within(name, arrow.what) and not re.match(arrow.by, path.as_posix())
    ]

    assert wrong == []


def spine() -> list[Path]:
    """The files that README's "Read the code" names."""
    section = (ROOT / "README.md").read_text().split("## Read the code")[1].split("\n## ")[0]
    return [Path(name) for name in re.findall(r"\]\(([\w/.]+\.py)\)", section)]


def module(path: Path) -> str:
    """The name by which the file is imported."""
    return ".".join(path.with_suffix("").parts).removeprefix("proto.")


def test_the_spine_imports_nothing_outside_itself() -> None:
    """What README's "Read the code" lists imports of ours only what stands there too, and a few named modules beside it."""
    names = {module(path) for path in spine()} | BESIDE_THE_SPINE.keys()
    ours = {module(path) for path in product()}
    wrong, used = [], set()
    for path in spine():
        for line, name in imported(path):
            owner = name if name in ours else name.rpartition(".")[0]
            if owner in ours and not within(name, tuple(names)):
                wrong.append(f"{path}:{line} imports {name}")
            used |= {each for each in BESIDE_THE_SPINE if within(name, (each,))}

    assert wrong == []
    assert used == BESIDE_THE_SPINE.keys(), "a module that stands beside the spine is used by it"


def test_the_spine_is_short() -> None:
    """What README's "Read the code" lists can be read in an afternoon."""
    lines = {path.as_posix(): len((ROOT / path).read_text().splitlines()) for path in spine()}

    assert sum(lines.values()) <= SPINE_LINES_MAX, lines


def test_a_client_needs_little() -> None:
    """What the wheel's users import rests on the wheel's requirements, or its extra's, and nothing else."""
    wrong = [
        f"{path}:{line} imports {name}"
        for path in product()
        if CLIENT.match(path.as_posix())
        for line, name in imported(path)
        if name.split(".")[0] not in CLIENT_MAY_IMPORT
    ]

    assert wrong == []


def test_functions_are_short() -> None:
    """A function fits a screen."""
    lengths = {
        f"{path}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in product()
        for node in functions(path)
    }

    assert {name: length for name, length in lengths.items() if length > FUNCTION_LINES_MAX} == {}


def test_every_test_states_its_claim() -> None:
    """Every test has a sentence that says what it claims."""
    silent = [
        f"{path}:{node.lineno} {node.name}"
        for path in python("tests")
        if path.name.startswith("test_")
        for node in functions(path)
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]

    assert silent == []


def test_some_things_are_not_said() -> None:
    """No file speaks of trackers, of one machine's folders, or of where packages come from."""
    said = []
    for path in files():
        try:
            lines = (ROOT / path).read_text().splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        said += [
            f"{path}:{number} names {what}"
            for number, line in enumerate(lines, start=1)
            for what, pattern in UNSAID.items()
            if re.search(pattern, line)
        ]

    assert said == []
