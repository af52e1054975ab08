"""The overrides, compiled here and called by stand-ins for TurboMind, cuBLAS and cublasLt, in other processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from service.engines.turbomind import overrides
from service.engines.turbomind.overrides import NoOverrides, build, digest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

TURBOMIND = r"""
#include <stddef.h>
int split(int max, int grid, int active, int sms, int waves, float a, float b) __asm__("_ZN9turbomind13GetSplitCountEiiiiiff");
int split(int max, int grid, int active, int sms, int waves, float a, float b) { return 100 + max; }
typedef struct { char data[512]; } Sequence;
static int seen, matched;
void plan_resume(void *scheduler, char *sequence) __asm__("_ZN9turbomind9Scheduler10PlanResumeERNS_8SequenceE");
void plan_resume(void *scheduler, char *sequence) { *(int *)(sequence + 0xf0) = matched; }
int drive_resume(int prompt, int cached) {
  static Sequence s;
  *(int *)(s.data + 0x2c) = prompt;
  matched = cached;
  plan_resume(NULL, s.data);
  return *(int *)(s.data + 0xf0);
}
void top_k(char *p, void *s) __asm__("_ZN9turbomind20invokeTopKSortFilterIfEEvRNS_20TopKSortFilterParamsEP11CUstream_st");
void top_k(char *p, void *s) { seen = *(int *)(p + 40); }
int cublasGemmEx(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int, const void *,
                 void *, int, int, int, int);
typedef struct { int begin, end, stops; } Prompt;
typedef struct { Prompt **first, **last, **room; int budget; } Pass;
int forward_end(const void *scheduler, const void *prompt, int begin, int desired, int end)
    __asm__("_ZNK9turbomind9Scheduler15ClampForwardEndERKNS_8SequenceEiii");
int forward_end(const void *scheduler, const void *prompt, int begin, int desired, int end) {
  return desired < end ? desired / 64 * 64 : desired; }
void admit(void *scheduler, Pass *pass, void *resource)
    __asm__("_ZN9turbomind9Scheduler20RunRequiredAdmissionERNS0_13ScheduleStateERNS_8ResourceE");
void admit(void *scheduler, Pass *pass, void *resource) {
  for (Prompt **each = pass->first; each < pass->last; each++) {
    Prompt *p = *each;
    int rest = p->end - p->begin, most = rest < pass->budget ? rest : pass->budget;
    if (!most) break;
    p->stops = forward_end(scheduler, p, p->begin, p->begin + most, p->end);
    if (p->stops > p->begin) pass->budget -= p->stops - p->begin;
  } }
int drive_pass(Prompt **prompts, int count, int budget) {
  Pass pass = {prompts, prompts + count, prompts + count, budget};
  admit(NULL, &pass, NULL);
  return pass.budget; }
void *lookup(char *out, const void *cache, const int *product)
    __asm__("_ZNK9turbomind4gemm13DispatchCache10LowerBoundERKNS0_8GemmDescE");
void *lookup(char *out, const void *cache, const int *product) {
  static const int tuned[] = {8, 16, 64};
  out[0x28] = 0;
  for (int i = 0; i < 3 && !out[0x28]; i++)
    if (product[product[20] ? 23 : 22] <= tuned[i]) *(int *)out = tuned[i], out[0x28] = 1;
  return out; }
int drive_lookup(int rows, int depth, int by_columns) {
  char out[0x30];
  int product[26] = {0};
  product[by_columns ? 23 : 22] = rows, product[20] = by_columns, product[24] = depth;
  return ((char *)lookup(out, NULL, product))[0x28] ? *(int *)out : 0; }
int drive_split(int max) { return split(max, 1, 1, 1, 4, 1, 1); }
int drive_top_k(int k) { int p[14] = {0}; p[10] = k; top_k((char *)p, NULL); return seen; }
int drive_gemm(void *handle, int m, int n, int k, const void *a, const void *b, void *c) {
  float one = 1, zero = 0;
  return cublasGemmEx(handle, 0, 0, m, n, k, &one, a, 2, m, b, 2, k, &zero, c, 2, m, 68, 99);
}
"""
"""A stand-in that calls its own replaced functions, and cuBLAS, through its PLT."""

CUBLAS = r"""
int cublasGemmEx(void *h, int ta, int tb, int m, int n, int k, const void *al, const void *a, int at, int lda, const void *b,
                 int bt, int ldb, const void *be, void *c, int ct, int ldc, int comp, int algo) {
  for (int i = 0; i < m * n; i++) ((unsigned short *)c)[i] = 7777;
  return 0;
}
int cublasCreate_v2(void **h) { *h = h; return 0; }
#ifdef WHOLE
int cublasGetStream_v2(void *h, void **s) { *s = h; return 0; }
#endif
"""
"""Its own choice of kernel is 7777. Without WHOLE, a stand-in for version 12 where 13 serves."""

CUBLASLT = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <stdlib.h>
typedef struct { uint64_t data[8]; } Algo;
typedef struct { Algo algo; size_t ws; int state; float waves; int res[4]; } Heur;
typedef struct { int64_t v[4]; } Thing;
size_t cublasLtGetVersion(void) { return VERSION; }
int cublasLtCreate(void **h) { *h = malloc(8); return 0; }
int cublasLtMatmulDescCreate(void **d, int comp, int scale) { *d = calloc(1, 64); return comp != 68 || scale; }
int cublasLtMatmulDescSetAttribute(void *d, int what, const void *v, size_t size) { return size != 4 || what < 3 || what > 4; }
int cublasLtMatrixLayoutCreate(void **l, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  Thing *t = calloc(1, sizeof *t); t->v[0] = rows; t->v[1] = cols; t->v[2] = ld; *l = t; return type != 2; }
int cublasLtMatmulPreferenceCreate(void **p) { *p = calloc(1, 16); return 0; }
int cublasLtMatmulPreferenceSetAttribute(void *p, int what, const void *v, size_t size) {
  if (what == 3) ((uint64_t *)p)[0] = 1 + *(const uint32_t *)v;
  if (what == 1) ((uint64_t *)p)[1] = *(const size_t *)v;
  return 0; }
int cublasLtMatmulPreferenceDestroy(void *p) { free(p); return 0; }
/* algorithm ids: 66 and 67 round alike; 16, for one token only, rounds otherwise; 30 rounds by how many tokens there are; 99
   splits K, against what was asked; 5 runs nowhere. Of each, the tile is the number of tokens it was offered for */
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, Thing *a, Thing *b, Thing *c, void *cc, void *p, int most, Heur *r,
                                   int *n) {
  int tokens = (int)b->v[1], count = 0;
  if (((uint64_t *)p)[0] != 1 || ((uint64_t *)p)[1] == 0) return 1;
  const int all[] = {tokens == 1 ? 16 : -1, 99, 30, 5, tokens % 2 ? 66 : 67, 66};
  for (int i = 0; i < 6 && count < most; i++) {
    if (all[i] < 0 || (tokens == 13 && all[i] > 60 && all[i] < 70)) continue; /* nothing that rounds alike for 13 tokens */
    memset(&r[count], 0, sizeof *r);
    r[count].algo.data[0] = all[i]; r[count].algo.data[1] = all[i] == 99 ? 3 : 1; r[count].state = all[i] == 5 ? 15 : 0;
    r[count].algo.data[2] = tokens;
    count++; }
  *n = count; return 0; }
int cublasLtMatmulAlgoConfigGetAttribute(const Algo *a, int what, void *v, size_t size, size_t *written) {
  if (size != (what < 7 ? 4 : 2)) return 1;
  uint32_t found = what == 0 ? a->data[0] : what == 1 ? a->data[2] : what == 2 ? a->data[1] : 0;
  memcpy(v, &found, size); *written = size; return 0; }
int cublasLtMatmulAlgoCheck(void *h, void *d, Thing *a, Thing *b, Thing *c, void *cc, const Algo *algo, Heur *r) {
  r->ws = algo->data[2] == 1000 ? 1000 : 0;
  return algo->data[0] == 5 || (algo->data[0] == 16 && b->v[1] > 1) ? 15 : 0; }
void *last_stream, *last_workspace; size_t last_bytes; int fail, last_tokens, last_tile; void *last_weights[8]; int runs;
int cublasLtMatmul(void *h, void *d, const void *al, const void *a, Thing *at, const void *b, Thing *bt, const void *be,
                   const void *c, Thing *ct, void *out, Thing *ot, const Algo *algo, void *ws, size_t bytes, void *stream) {
  if (fail) return 15;
  int odd = algo->data[0] == 66 || algo->data[0] == 67 ? 0 : (int)(algo->data[0] + ct->v[1]);
  for (int j = 0; j < ct->v[1]; j++) for (int i = 0; i < ct->v[0]; i++)
    ((uint16_t *)out)[j * ct->v[2] + i] = ((const uint16_t *)b)[j * bt->v[2]] * 3 + i + odd;
  last_stream = stream; last_workspace = ws; last_bytes = bytes; last_tile = algo->data[2];
  last_weights[runs++ % 8] = (void *)a; last_tokens = (int)ct->v[1]; return 0; }
"""

DRIVER = r"""
#include <string.h>
int current; int cuCtxGetDevice(int *device) { *device = current; return 0; }
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) { memcpy(to, from, bytes); return 0; }
"""

OTHER = r"""
int cublasGemmEx(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int, const void *,
                 void *, int, int, int, int);
int foreign(void *h, void *c) {
  float one = 1;
  return cublasGemmEx(h, 0, 0, 4, 1, 2, &one, c, 2, 4, c, 2, 2, &one, c, 2, 4, 68, 99);
}
"""
"""Another library that uses the same cuBLAS."""

PRELUDE = """
import ctypes, json, sys
from array import array
from pathlib import Path
from service.engines.turbomind.overrides import Matrices, Mode, Overrides, Resume
from service.engines.turbomind.kernels import PERIOD, Trial, choose, grid

folder = Path(sys.argv[1])
overrides = Overrides(Path(sys.argv[2]))
overrides.configure(folder / "_turbomind.so", int(sys.argv[3]))
turbomind = ctypes.CDLL(str(folder / "_turbomind.so"))
for name in ("drive_gemm",):
    getattr(turbomind, name).argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3, *[ctypes.c_void_p] * 3]
HANDLE, M, K = 0x5150, 8, 4
space = ctypes.create_string_buffer(64)
overrides.set_workspace(0, space, ctypes.addressof(space), 64)

def buffers(n):
    b, c = array("H", [17 * (j % PERIOD) for j in range(n) for _ in range(K)]), array("H", [0] * (M * n))
    return b, c

def gemm(n, k=K):
    b, c = buffers(n)
    status = turbomind.drive_gemm(HANDLE, M, n, k, b.buffer_info()[0], b.buffer_info()[0], c.buffer_info()[0])
    return status, list(c)

def serve(*algorithms):
    overrides.mode(Mode.LEARN), gemm(1)
    shape, = overrides.shapes()
    overrides.permit(shape, algorithms)
    overrides.mode(Mode.SERVE)
    return shape

def attempt(shape, n, candidate, times=1, stride=0, copies=1):
    b, c = buffers(n)
    matrices = Matrices(b.buffer_info()[0], stride, copies, b.buffer_info()[0], c.buffer_info()[0], 0)
    return overrides.attempt(shape, n, candidate, matrices, times), [list(c[j * M : (j + 1) * M]) for j in range(n)]

def measure(shape, n_max):
    trials = []
    for n in grid(n_max):
        for rank, candidate in enumerate(overrides.offers(shape, n)):
            ran, rows = attempt(shape, n, candidate)
            if ran:
                alike = all(rows[j] == rows[j % PERIOD] for j in range(n))
                trials.append(Trial(n, rank, candidate, alike, tuple(str(row) for row in rows[:PERIOD])))
    return choose(trials), trials

def value(name, kind=ctypes.c_int):
    return kind.in_dll(ctypes.CDLL(Path(overrides.open()[1]).name), name)

def alike(values, n):
    rows = [values[j * M : (j + 1) * M] for j in range(n)]
    return rows == [[17 * (j % PERIOD) * 3 + i for i in range(M)] for j in range(n)]
"""


def compiled(folder: Path, name: str, source: str, *flags: str) -> None:
    (folder / f"{name}.c").write_text(source)
    command = f"cc -shared -fPIC -O1 -w -o {folder / name} {folder / name}.c -L{folder}"
    subprocess.run([*command.split(), *flags], check=True)


def versioned(folder: Path, major: int) -> str:
    script = folder / f"cublas{major}.map"
    script.write_text(f"libcublas.so.{major} {{ global: cublas*; local: *; }};\n")
    return f"-Wl,--version-script={script},-soname,libcublas.so.{major}"


@pytest.fixture(params=["cuda 12", "cuda 13 behind a stand-in"], scope="module")
def stand_ins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the libraries of such a host."""
    tmp_path = tmp_path_factory.mktemp("host")
    if request.param == "cuda 12":
        compiled(tmp_path, "libcublas.so.12", CUBLAS, "-DWHOLE", versioned(tmp_path, 12))
        compiled(tmp_path, "libcublasLt.so.12", CUBLASLT, "-DVERSION=120804", "-Wl,-soname,libcublasLt.so.12")
    else:
        compiled(tmp_path, "libcublas.so.12", CUBLAS, versioned(tmp_path, 12))
        compiled(tmp_path, "libcublasLt.so.12", "int unused;", "-Wl,-soname,libcublasLt.so.12")
        compiled(tmp_path, "libcublas.so.13", CUBLAS, "-DWHOLE", versioned(tmp_path, 13))
        compiled(tmp_path, "libcublasLt.so.13", CUBLASLT, "-DVERSION=130100", "-Wl,-soname,libcublasLt.so.13")
    compiled(tmp_path, "_turbomind.so", TURBOMIND, "-l:libcublas.so.12", "-l:libcublasLt.so.12", "-Wl,--no-as-needed")
    compiled(tmp_path, "libcuda.so.1", DRIVER, "-Wl,-soname,libcuda.so.1")
    compiled(tmp_path, "other.so", OTHER, "-l:libcublas.so.12")
    return tmp_path


Drive = Callable[..., Any]


@pytest.fixture
def drive(stand_ins: Path) -> Drive:
    """Runs a script in a new process of such a host, and returns the JSON that it prints."""
    return partial(_drive, stand_ins)


def _drive(folder: Path, script: str, *, before: str = "", splits: int = 4, omit: str = "") -> Any:
    path = build(folder / "state")
    program = PRELUDE + before + textwrap.dedent(script)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/proto", "LD_LIBRARY_PATH": str(folder), "OSTINATO_TURBOMIND_OMIT": omit}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(path), str(splits)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_attention_is_cut_into_a_constant_number_of_parts(drive: Drive) -> None:
    """The number of parts is constant, except that a request for at most one part gets one."""
    script = "print(json.dumps([turbomind.drive_split(n) for n in (0, 1, 2, 7, 128)]))"

    assert drive(script, splits=8) == [1, 1, 8, 8, 8]


def test_every_top_k_is_sorted_by_the_largest_kernel(drive: Drive) -> None:
    """TurboMind's own function is called with its maximum raised to 1024, and never lowered."""
    found = drive(
        """
        found = [turbomind.drive_top_k(k) for k in (1, 40, 1024, 5000)]
        print(json.dumps([found, overrides.counters.calls]))
        """,
    )

    assert found == [[1024, 1024, 1024, 5000], {"split_count": 0, "top_k": 4, "gemm": 0, "resume": 0, "piece": 0, "lookup": 0}]


def test_left_out_overrides_behave_as_stock_and_still_count(drive: Drive) -> None:
    """An override that is left out has TurboMind's own behaviour, and counts its calls."""
    found = drive(
        """
        overrides.mode(Mode.LEARN), gemm(3), overrides.mode(Mode.SERVE)
        found = [turbomind.drive_split(7), turbomind.drive_top_k(40), gemm(3)[1][0], overrides.counters.calls]
        print(json.dumps([found, overrides.counters.uncovered]))
        """,
        omit="split_count,top_k,gemm",
    )

    assert found == [[107, 40, 7777, {"split_count": 1, "top_k": 1, "gemm": 1, "resume": 0, "piece": 0, "lookup": 0}], 0]


RESUMES = """
print(json.dumps([[turbomind.drive_resume(*each) for each in ((129, 128), (130, 128), (128, 127), (1, 0), (2, 1), (129, 0))],
    overrides.resumed, overrides.counters.corrected, overrides.counters.calls["resume"]]))
"""


@pytest.mark.parametrize(
    ("mode", "omit", "planned", "seen", "corrected"),
    [
        ("CORRECT", "", [127, 128, 126, 0, 1, 0], [129, 0], 2),
        ("WATCH", "", [128, 128, 127, 0, 1, 0], [129, 0], 0),
        ("UNWATCHED", "", [128, 128, 127, 0, 1, 0], [0, 0], 0),
        ("CORRECT", "resume", [128, 128, 127, 0, 1, 0], [129, 0], 0),
    ],
)
def test_a_rest_of_one_token_is_made_one_of_two(
    mode: str, omit: str, planned: list[int], seen: list[int], corrected: int, drive: Drive
) -> None:
    """A rest of one token becomes one of two, and no other plan changes. Watching writes nothing, and without it nothing is
    read; leaving the override out only watches."""
    found = drive(f"overrides.resume(Resume.{mode})" + RESUMES, omit=omit)

    assert found == [planned, seen, corrected, 6]


PASSES = """
import random
class Prompt(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_int), ("end", ctypes.c_int), ("stops", ctypes.c_int)]

def admit(prompts, budget):
    pointers = (ctypes.c_void_p * len(prompts))(*map(ctypes.addressof, prompts))
    turbomind.drive_pass(pointers, len(prompts), budget)

def cuts(lengths, begin=0):
    prompts = [Prompt(begin, length, 0) for length in lengths]
    found = [[] for _ in prompts]
    for _ in range(100):
        admit([each for each in prompts if each.begin < each.end], STEP + 8)
        for place, each in enumerate(prompts):
            if each.begin < each.end and each.stops > each.begin:
                found[place].append(each.stops)
                each.begin = each.stops
    assert all(each.begin == each.end for each in prompts)
    return found
PIECE, STEP, CONTEXT = 256, 576, 4096
"""


def test_a_prompt_is_cut_by_its_own_length_alone(drive: Drive) -> None:
    """Pieces end at multiples of the constant, whatever runs beside the prompt and wherever its cached beginning ends; no piece
    has one token."""
    found = drive(
        """
        overrides.pieces(PIECE, STEP, CONTEXT)
        lengths = [2, 255, 256, 257, 258, 511, 512, 513, 1000, 1024, 1025, 3000]
        alone = [cuts([length])[0] for length in lengths]
        shuffled = lengths * 3
        random.Random(1).shuffle(shuffled)
        together = all(found == alone[lengths.index(length)] for found, length in zip(cuts(shuffled), shuffled))
        print(json.dumps([dict(zip(lengths, alone)), together, cuts([700], begin=255)[0], cuts([514], begin=512)[0]]))
        """,
        before=PASSES,
    )

    assert found[0]["257"] == [257] and found[0]["258"] == [256, 258] and found[0]["513"] == [256, 513]
    assert found[0]["1025"] == [256, 512, 768, 1025] and found[0]["3000"] == [*range(256, 2817, 256), 3000]
    assert found[1:] == [True, [512, 700], [514]]


def test_no_pass_leaves_out_what_runs(drive: Drive) -> None:
    """Whatever arrives: every decode and the prompt in pieces are in every pass, one prompt at most is in pieces, a pass
    holds no more tokens and contexts than it may, and every prompt comes to its end."""
    found = drive(
        """
        overrides.pieces(PIECE, STEP, CONTEXT)
        draw, running, done, passes = random.Random(5), [], 0, 0
        arrived = 0
        while done < 300:
            if arrived < 300 and draw.random() < 0.5:
                length = draw.choice([2, 40, 200, 257, 300, 513, 900, 4000])
                cached = draw.choice([0, 0, 64, length - 2]) if length > 70 else 0
                running.append([Prompt(cached, length, 0), draw.randrange(1, 30)])
                arrived += 1
            for each, _ in running:
                each.stops = each.begin
            decoding = [each for each, _ in running if each.begin >= each.end - 1 and each.begin]
            partial = [each for each, _ in running if each.begin < each.end - 1 and each.begin % PIECE == 0 and each.begin]
            before = [(each, each.begin) for each, _ in running]
            admit([each for each, _ in running], STEP + len(running))
            passes += 1
            assert all(each.stops == each.end for each in decoding), "a decode was left out"
            prompts = [(each, begin) for each, begin in before if each.stops - begin > 1]
            assert sum(each.stops - begin for each, begin in prompts) <= STEP
            assert sum(each.stops < each.end for each, _ in prompts) <= 1
            for each in running:
                sequence, left = each
                if sequence.stops == sequence.begin:
                    continue
                sequence.begin = sequence.stops
                if sequence.begin == sequence.end:
                    sequence.end += 1
                    each[1] -= 1
            done += sum(left == 0 for _, left in running)
            running = [each for each in running if each[1]]
            assert passes < 20_000
        print(json.dumps([done, overrides.counters.cuts > 100, overrides.counters.strays]))
        """,
        before=PASSES,
    )

    assert found == [300, True, 0]


def test_a_prompt_in_pieces_that_is_cancelled_holds_up_no_other(drive: Drive) -> None:
    """TurboMind would fail the oldest prompt of a pass that admits none: the next long prompt begins at once."""
    found = drive(
        """
        overrides.pieces(PIECE, STEP, CONTEXT)
        first, second = Prompt(0, 1000, 0), Prompt(0, 900, 0)
        admit([first, second], STEP + 8)
        before = [first.stops, second.stops]
        admit([second], STEP + 8)
        print(json.dumps([before, second.stops, overrides.counters.strays]))
        """,
        before=PASSES,
    )

    assert found == [[256, 0], 256, 0]


@pytest.mark.parametrize(("setting", "omit"), [("", ""), ("overrides.pieces(PIECE, STEP, CONTEXT)", "piece")])
def test_prompts_are_cut_as_turbomind_likes_unless_told(setting: str, omit: str, drive: Drive) -> None:
    """Before it is told, and where it is left out, the override only reads what TurboMind plans."""
    script = f"{setting}\nprint(json.dumps([cuts([1000, 600]), overrides.step, overrides.counters.cuts]))"

    assert drive(script, before=PASSES, omit=omit) == [[[576, 1000], [128, 600]], [128, 600, 600], 0]


@pytest.mark.parametrize("omit", ["", "lookup"])
def test_own_kernels_are_looked_up_by_permitted_rows_alone(omit: str, drive: Drive) -> None:
    """Each product is served by the kernel of the next permitted number of rows, or of the last; other products, and those of a
    service without the override, by TurboMind's choice."""
    found = drive(
        """
        product = lambda depth, by_columns=0: tuple(depth if i == 24 else by_columns if i == 20 else 0 for i in range(26))
        before = [turbomind.drive_lookup(m, 5, 0) for m in (1, 9, 64, 65)]
        overrides.kernels({product(5): [16], product(6): [8, 64], product(7, 1): [64], product(8): [100]})
        after = [[turbomind.drive_lookup(m, k, k == 7) for m in (1, 9, 64, 65)] for k in (4, 5, 6, 7, 8)]
        print(json.dumps([before, after, overrides.counters.pinned]))
        """,
        omit=omit,
    )

    stock = [8, 16, 64, 0]
    pinned = [stock, [16] * 4, [8, 64, 64, 64], [64] * 4, stock]
    assert found == ([stock, [stock] * 5, 0] if omit else [stock, pinned, 12])


def test_products_are_learned_proved_and_served(drive: Drive) -> None:
    """Learning records shapes and leaves cuBLAS's choice; serving gives a row the same bits at every number of tokens, on the
    handle's stream."""
    found = drive(
        """
        stock = gemm(5)
        overrides.mode(Mode.LEARN)
        learning = [gemm(n)[1][0] for n in (1, 9, 4)]
        (shape, n_max), = overrides.shapes().items()
        permitted, trials = measure(shape, 12)
        overrides.permit(shape, permitted)
        overrides.mode(Mode.SERVE)
        served = [n for n in range(1, 13) if gemm(n) == (0, gemm(n)[1]) and alike(gemm(n)[1], n)]
        counters = overrides.counters
        print(json.dumps({
            "stock": stock[1][0], "learning": learning, "shape": [shape.m, shape.k, n_max], "permitted": permitted,
            "tried": sorted({t.algorithm for t in trials}), "served": served,
            "calls": counters.calls["gemm"], "plans": counters.plans, "uncovered": counters.uncovered,
            "version": overrides.open()[0], "library": Path(overrides.open()[1]).name,
        }))
        """,
    )

    library = found.pop("library")
    assert found == {
        "stock": 7777,
        "learning": [7777] * 3,
        "shape": [8, 4, 9],
        "permitted": [66, 67],
        "tried": [16, 30, 66, 67],
        "served": list(range(1, 13)),
        "calls": 3 + 3 * 12,
        "plans": 12,
        "uncovered": 0,
        "version": 130100 if library.endswith("13") else 120804,
    }
    assert library in ("libcublasLt.so.12", "libcublasLt.so.13")


def test_what_cannot_be_served_exactly_goes_to_cublas_and_is_counted(drive: Drive) -> None:
    """A number of tokens without a permitted algorithm, an unknown shape and a failing product each count as one uncovered
    call, and cuBLAS serves."""
    found = drive(
        """
        shape = serve(66, 67)
        counts = [overrides.counters.uncovered]
        for call in (lambda: gemm(2), lambda: gemm(13), lambda: gemm(2, k=2)):
            status, values = call()
            counts.append([status, values[0] == 7777, overrides.counters.uncovered])
        value("fail").value = 1
        status, values = gemm(2)
        counts.append([status, values[0] == 7777, overrides.counters.uncovered])
        print(json.dumps([counts, overrides.covers(shape, 2), overrides.covers(shape, 13)]))
        """,
    )

    assert found == [[0, [0, False, 0], [0, True, 1], [0, True, 2], [0, True, 3]], True, False]


def test_others_who_use_cublas_are_left_alone(drive: Drive) -> None:
    """Calls from other libraries get cuBLAS's own choice, and are not counted."""
    found = drive(
        """
        overrides.mode(Mode.SERVE)
        other = ctypes.CDLL(str(folder / "other.so"))
        other.foreign.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        c = array("H", [0] * 8)
        status = other.foreign(HANDLE, c.buffer_info()[0])
        print(json.dumps([status, c[0], overrides.counters.calls["gemm"], overrides.counters.uncovered]))
        """,
    )

    assert found == [0, 7777, 0, 0]


def test_a_product_runs_on_its_handles_stream_in_its_gpus_workspace(drive: Drive) -> None:
    """A product runs on the handle's stream, in the workspace that was lent for its GPU."""
    found = drive(
        """
        other = ctypes.create_string_buffer(32)
        overrides.set_workspace(1, other, ctypes.addressof(other), 32)
        serve(66)
        used = []
        for device in (0, 1, 0):
            ctypes.c_int.in_dll(ctypes.CDLL("libcuda.so.1"), "current").value = device
            gemm(3)
            stream, memory = (value(name, ctypes.c_void_p).value for name in ("last_stream", "last_workspace"))
            place = {ctypes.addressof(space): 0, ctypes.addressof(other): 1}.get(memory)
            used.append([stream == HANDLE, place, value("last_bytes", ctypes.c_size_t).value])
        print(json.dumps(used))
        """,
    )

    assert found == [[True, 0, 64], [True, 1, 32], [True, 0, 64]]


def test_the_fastest_serves_up_to_the_number_of_tokens_it_was_found_at(drive: Drive) -> None:
    """Beyond the last, where none is named, and where it cannot run or wants more memory than there is, cublasLt's own
    favourite of those permitted does."""
    found = drive(
        """
        shape = serve(66, 67)
        code = lambda n, algorithm: next(c.code for c in overrides.offers(shape, n) if c.algorithm == algorithm)
        impossible = next(c.code for c in overrides.offers(shape, 1) if c.algorithm == 16)
        told = {2: code(700, 66), 4: code(800, 67), 6: impossible, 8: code(1000, 66), 10: b"", 12: code(9, 66)}
        for n, chosen in told.items():
            overrides.prefer(shape, n, chosen)
        tiles = {}
        for n in (1, 2, 3, 4, 5, 7, 10, 11, 14):
            assert alike(gemm(n)[1], n)
            tiles[n] = value("last_tile").value
        print(json.dumps([tiles, overrides.counters.uncovered]))
        """,
    )

    assert found == [{"1": 700, "2": 700, "3": 800, "4": 800, "5": 5, "7": 7, "10": 10, "11": 9, "14": 14}, 0]


def test_a_candidate_is_tried_many_times_on_other_weights_each_time(drive: Drive) -> None:
    """Timed products use copies of the weights in turn, and a candidate that cannot run is reported."""
    found = drive(
        """
        overrides.mode(Mode.LEARN), gemm(1)
        shape, = overrides.shapes()
        best = {c.algorithm: c for c in overrides.offers(shape, 1)}
        ran, _ = attempt(shape, 1, best[66], times=5, stride=64, copies=2)
        weights = list(value("last_weights", ctypes.c_void_p * 8))[:5]
        refused, rows = attempt(shape, 2, best[16])
        print(json.dumps([ran, [each - weights[0] for each in weights], refused, rows]))
        """,
    )

    assert found == [True, [0, 64, 0, 64, 0], False, [[0] * 8] * 2]


def test_the_library_is_built_once_and_named_after_its_source(tmp_path: Path) -> None:
    """The overrides are compiled once."""
    first = build(tmp_path)
    modified = first.stat().st_mtime_ns

    assert (build(tmp_path), first.stat().st_mtime_ns) == (first, modified)
    assert digest()[:16] in first.name


def test_an_image_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library beside the source is used, also without a compiler."""
    for name in overrides.SOURCES:
        shutil.copy(Path(overrides.__file__).with_name(name), tmp_path)
    monkeypatch.setattr(overrides, "_HERE", tmp_path)
    made = build(tmp_path)
    monkeypatch.setenv("CC", "/nowhere/cc")

    assert build(tmp_path / "state") == made
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("compiler", "why"), [("", "no C compiler"), ("false", "false cannot compile them")])
def test_without_a_compiler_the_reason_is_said(
    compiler: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler, or with one that fails, there are no overrides, and the error says so."""
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(NoOverrides, match=why):
        build(tmp_path / "state")


def test_products_with_few_outputs_are_padded(drive: Drive) -> None:
    """For most numbers of tokens cublasLt has other algorithms for them: they are computed for the next multiple of eight, with
    nothing read or written behind their own rows."""
    found = drive(
        """
        M = 1
        large = ctypes.create_string_buffer(4096)
        overrides.set_workspace(0, large, ctypes.addressof(large), 4096)
        shape = serve(66)
        rows = []
        for n in (1, 3, 8, 13, 21):
            b, c = array("H", [17 * (j % PERIOD) for j in range(n) for _ in range(K)]), array("H", [5] * (n + 4))
            status = turbomind.drive_gemm(HANDLE, 1, n, K, b.buffer_info()[0], b.buffer_info()[0], c.buffer_info()[0])
            rows.append([status, value("last_tokens").value, alike(list(c)[:n], n), list(c)[n:] == [5] * 4])
        print(json.dumps([rows, [shape.computed(n) for n in (1, 8, 9)], overrides.counters.uncovered]))
        """,
    )

    assert found == [[[0, tokens, True, True] for tokens in (8, 8, 8, 16, 24)], [8, 8, 16], 0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")
def test_a_planted_library_is_not_loaded(tmp_path: Path) -> None:
    """A library that another user put where ours is kept is refused and named; the folder of ours is closed for others."""
    tmp_path.chmod(0o777)
    path = build(tmp_path)
    assert tmp_path.stat().st_mode & 0o077 == 0
    os.chown(path, 65_534, 65_534)

    with pytest.raises(NoOverrides, match=f"they cannot be kept: {path}: its owner is uid 65534"):
        build(tmp_path)
