"""The overrides (overrides.c says which and why): compiled on this machine, loaded first, configured, and counted. Nothing here
needs a GPU until products are served."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int32, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from serving import files

ABI = 4
SOURCES = ("overrides.c", "cublaslt.h")
LINKED_AS = "libcublas.so.12 { global: cublasGemmEx; };\n"
"""Version script: only references to this version of cublasGemmEx resolve to ours."""
FLAGS = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")
COMPILERS = ("cc", "gcc", "clang")
RESUME, PIECE, LOOKUP = "resume", "piece", "lookup"
"""The overrides that decide how much of a prompt the prefix cache supplies, where a step of a prompt ends, and which of
TurboMind's own kernels serves."""
NAMES = ("split_count", "top_k", "gemm", RESUME, PIECE, LOOKUP)
"""In the order of their counters."""
REQUIRED = ("split_count", "top_k", "gemm", PIECE, LOOKUP)
"""Those that every first run reaches."""
SHAPES_MAX = 64
TUNED_MAX = 64
"""Products that TurboMind's own kernels serve, and numbers of rows that each was tuned for."""
PRODUCT_NUMBERS = 26
"""int32 in TurboMind's description of a product."""
OFFERS_MAX = 32
NARROW = 8
"""Products with fewer outputs are computed for multiples of so many tokens: for others cublasLt has other algorithms."""
PERMITTED_MAX = 16
TOP_K_BUCKET = 1024
"""The largest one: every top_k that TurboMind accepts is sorted by the same kernel."""
OMIT = "OSTINATO_TURBOMIND_OMIT"
"""Environment variable: overrides to leave out, comma separated, to test that EXACT is not earned without them."""
_HERE = Path(__file__).parent


class Mode(IntEnum):
    """How a product is computed: by cuBLAS's choice; the same, and its shape is recorded; by a permitted algorithm."""

    STOCK = 0
    LEARN = 1
    SERVE = 2


class Resume(IntEnum):
    """What happens to TurboMind's plan to resume a prompt from the cache: nothing; it is recorded; it is recorded, and a rest
    of one token is made one of two."""

    UNWATCHED = 0
    WATCH = 1
    CORRECT = 2


class NoOverrides(Exception):
    """The overrides cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Since the process began."""

    calls: Mapping[str, int]
    """By override, see NAMES."""
    plans: int
    uncovered: int
    """Products that no permitted algorithm could serve, and cuBLAS served by its own choice."""
    corrected: int = 0
    """Rests of one token that were made rests of two."""
    cuts: int = 0
    """Pieces of prompts, the last of each prompt left out."""
    strays: int = 0
    """Prompts in pieces that a pass was not expected to have."""
    pinned: int = 0
    """Products that a permitted kernel of TurboMind's own served."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """A kind of product as TurboMind passes it to cublasGemmEx, in cuBLAS's numbers. The tokens are not part of it."""

    transa: int
    transb: int
    m: int
    k: int
    a_type: int
    b_type: int
    c_type: int
    lda: int
    ldb: int
    ldc: int
    compute: int

    def computed(self, n: int) -> int:
        """The number of tokens that n are computed as."""
        return -(-n // NARROW) * NARROW if self.m < NARROW else n


@dataclass(frozen=True, slots=True)
class Candidate:
    """An algorithm, as cublasLt configures it for a product."""

    algorithm: int
    config: tuple[int, ...]
    """Tile, stages, cluster and so on, which change the speed."""
    code: bytes
    """cublasLt's own form of it, for the same version."""


class Matrices(NamedTuple):
    """Device pointers of a product, and its stream, as ost_try takes them."""

    a: int
    """The weights. `copies` of them, `stride_bytes` apart, are used in turn."""
    stride_bytes: int
    copies: int
    b: int
    c: int
    stream: int


class _Shape(ctypes.Structure):
    _fields_ = [(each.name, c_int32) for each in fields(Shape)]


class _Entry(ctypes.Structure):
    _fields_ = [("shape", _Shape), ("n_max", c_int32), ("permitted", c_int32), ("ids", c_int32 * PERMITTED_MAX)]


class _Kernels(ctypes.Structure):
    _fields_ = [("product", c_int32 * PRODUCT_NUMBERS), ("count", c_int32), ("rows", c_int32 * TUNED_MAX)]


class _Candidate(ctypes.Structure):
    _fields_ = [("code", c_uint64 * 8), ("config", c_int32 * 9)]


_EXPORTS: Mapping[str, tuple[Any, ...]] = {
    "ost_abi": (c_int,),
    "ost_configure": (None, c_char_p, c_int, c_int),
    "ost_mode": (None, c_int),
    "ost_resume": (None, c_int),
    "ost_resumed": (None, POINTER(c_int32)),
    "ost_pieces": (None, c_int, c_int, c_int),
    "ost_step": (None, POINTER(c_int32)),
    "ost_kernels": (c_int, POINTER(_Kernels), c_int),
    "ost_workspace": (None, c_int, c_void_p, c_size_t),
    "ost_open": (c_size_t, POINTER(c_char_p)),
    "ost_shapes": (c_int, POINTER(_Entry), c_int),
    "ost_offers": (c_int, POINTER(_Shape), c_int, POINTER(_Candidate)),
    "ost_try": (c_int, POINTER(_Shape), c_int, c_char_p, c_int, c_void_p, c_size_t, c_int, c_void_p, c_void_p, c_void_p),
    "ost_permit": (c_int, POINTER(_Shape), POINTER(c_int32), c_int),
    "ost_prefer": (c_int, POINTER(_Shape), c_int, c_char_p),
    "ost_cover": (c_int, POINTER(_Shape), c_int),
}


def digest() -> str:
    """SHA-256 of the sources and the compiler's flags."""
    parts = [(_HERE / name).read_bytes() for name in SOURCES] + [LINKED_AS.encode(), " ".join(FLAGS).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def build(folder: Path) -> Path:
    """The path of the shared library: the one beside the source (in an image), or the one in this folder, compiled if it is not
    there. Raises NoOverrides."""
    name = f"overrides-{digest()[:16]}.so"
    if (_HERE / name).exists():
        return _HERE / name
    try:
        path = files.private_folder(folder) / name
        if path.exists():
            files.check(path, path.lstat())
            return path
    except OSError as error:
        raise NoOverrides(f"they cannot be kept: {error}") from error
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NoOverrides(f"there is no C compiler ({', '.join(COMPILERS)})")
    draft, script = path.with_suffix(f".{os.getpid()}"), path.with_suffix(".map")
    try:
        script.write_text(LINKED_AS)
        command = [compiler, *FLAGS, f"-Wl,--version-script={script}", "-o", str(draft), str(_HERE / SOURCES[0]), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise NoOverrides(f"{compiler} cannot compile them: {done.stderr.strip()[-500:]}")
        draft.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoOverrides(f"they cannot be compiled: {error}") from error
    return path


class Overrides:
    """The loaded library. One thread calibrates; any thread may read the counters."""

    def __init__(self, path: Path) -> None:
        """Must be called before torch and TurboMind are loaded, which would load cuBLAS first. Raises NoOverrides."""
        self.path = path
        self.omitted = frozenset(filter(None, os.environ.get(OMIT, "").split(",")))
        try:
            self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            for name, (result, *arguments) in _EXPORTS.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NoOverrides(f"{path} cannot be loaded: {error}") from error
        if (found := self._library.ost_abi()) != ABI:
            raise NoOverrides(f"{path} is version {found}, not {ABI}")
        self._calls = (c_uint64 * len(NAMES)).in_dll(self._library, "ost_calls")
        self._counted = {
            each.name: c_uint64.in_dll(self._library, f"ost_{each.name}") for each in fields(Counters) if each.name != "calls"
        }
        self._workspaces: list[object] = []

    def configure(self, turbomind: Path, splits: int) -> None:
        """Before TurboMind's library at this path is loaded."""
        splits = 0 if "split_count" in self.omitted else splits
        bucket = 0 if "top_k" in self.omitted else TOP_K_BUCKET
        self._library.ost_configure(os.fsencode(turbomind), splits, bucket)

    def mode(self, mode: Mode) -> None:
        self._library.ost_mode(Mode.STOCK if mode is Mode.SERVE and "gemm" in self.omitted else mode)

    def resume(self, mode: Resume) -> None:
        """CORRECT only after recorded plans have had the expected values."""
        self._library.ost_resume(Resume.WATCH if mode is Resume.CORRECT and RESUME in self.omitted else mode)

    @property
    def resumed(self) -> tuple[int, int]:
        """Tokens of the newest recorded prompt, and how many of them TurboMind planned to take from its cache."""
        found = (c_int32 * 2)()
        self._library.ost_resumed(found)
        return found[0], found[1]

    def pieces(self, piece_tokens: int, step_tokens: int, context_tokens: int) -> None:
        """Cut prompts into pieces from now on. A step holds at most `step_tokens` of prompts, and new prompts of at most
        `context_tokens` in all."""
        self._library.ost_pieces(0 if PIECE in self.omitted else piece_tokens, step_tokens, context_tokens)

    @property
    def step(self) -> tuple[int, int, int]:
        """Of the newest step of a prompt of more than one token: where it began, where TurboMind would have ended it, and where
        the prompt ends."""
        found = (c_int32 * 3)()
        self._library.ost_step(found)
        return found[0], found[1], found[2]

    def kernels(self, permitted: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        """Serve each product, described by TurboMind's numbers with 0 rows, only with the kernels that were tuned for these
        numbers of rows, rising. Nothing may run meanwhile. Raises NoOverrides if there are too many."""
        if any(len(rows) > TUNED_MAX for rows in permitted.values()):
            raise NoOverrides("TurboMind tunes its kernels for more numbers of rows than there is room for")
        own = {} if LOOKUP in self.omitted else permitted
        given = (_Kernels * max(1, len(own)))()
        for place, (product, rows) in zip(given, own.items(), strict=False):
            place.product, place.count = (c_int32 * PRODUCT_NUMBERS)(*product), len(rows)
            place.rows = (c_int32 * TUNED_MAX)(*rows)
        if not self._library.ost_kernels(given, len(own)):
            raise NoOverrides("the model has more products of TurboMind's own kernels than there is room for")

    def open(self) -> tuple[int, str]:
        """Version and path of the cublasLt that serves on the current device. Raises NoOverrides."""
        path = c_char_p()
        version = self._library.ost_open(ctypes.byref(path))
        if not version:
            raise NoOverrides("no cublasLt can be opened")
        return int(version), os.fsdecode(path.value or b"")

    def set_workspace(self, device: int, workspace: object, pointer: int, size: int) -> None:
        """Memory on a device for its products, at `pointer`. `workspace` is kept alive."""
        self._workspaces.append(workspace)
        self._library.ost_workspace(device, pointer, size)

    def shapes(self) -> Mapping[Shape, int]:
        """Recorded shapes, and the most tokens of each."""
        entries = (_Entry * SHAPES_MAX)()
        count = self._library.ost_shapes(entries, SHAPES_MAX)
        return {Shape(*(getattr(e.shape, each.name) for each in fields(Shape))): e.n_max for e in entries[:count]}

    def offers(self, shape: Shape, n: int) -> list[Candidate]:
        """What cublasLt would run n tokens with, without splitting K; the one that it prefers is first."""
        found = (_Candidate * OFFERS_MAX)()
        count = self._library.ost_offers(_native(shape), n, found)
        return [Candidate(each.config[0], tuple(each.config), bytes(each.code)) for each in found[:count]]

    def attempt(self, shape: Shape, n: int, candidate: Candidate, matrices: Matrices, times: int = 1) -> bool:
        """Queues a product `times`. False: the candidate cannot run it."""
        return not self._library.ost_try(_native(shape), n, candidate.code, times, *matrices)

    def permit(self, shape: Shape, algorithms: Sequence[int]) -> None:
        """Raises NoOverrides if there are too many shapes or algorithms."""
        if not self._library.ost_permit(_native(shape), (c_int32 * len(algorithms))(*algorithms), len(algorithms)):
            raise NoOverrides("the model has more kinds of products than there is room for")

    def prefer(self, shape: Shape, n: int, code: bytes) -> None:
        """Serve up to n tokens with this permitted algorithm; empty: with the one that cublasLt prefers. To be called by
        rising n."""
        if not self._library.ost_prefer(_native(shape), n, code or None):
            raise NoOverrides("there is no room for more algorithms of one product")

    def covers(self, shape: Shape, n: int) -> bool:
        """Whether a permitted algorithm can serve n tokens. It is chosen now."""
        return bool(self._library.ost_cover(_native(shape), n))

    @property
    def counters(self) -> Counters:
        calls = dict(zip(NAMES, self._calls, strict=True))
        return Counters(calls, **{name: counter.value for name, counter in self._counted.items()})


def _native(shape: Shape) -> _Shape:
    return _Shape(*(getattr(shape, each.name) for each in fields(Shape)))
