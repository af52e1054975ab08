/* What makes TurboMind's answers independent of the batch: functions that it calls through its PLT, replaced.

   GetSplitCount         how many parts a decode's attention is cut into: a constant, not a function of the batch
   invokeTopKSortFilter  which kernel sorts: always that of the largest top_k
   cublasGemmEx          dense products: cublasLt, with algorithms that were found to round alike for every number of tokens
   LowerBound            products of experts and of quantised weights: of TurboMind's own kernels, which it picks by number of
                         rows, only those that were found to round alike
   PlanResume            how much of a prompt the prefix cache supplies: never all but one token, because one token alone goes
                         through the kernels of a decode, which round otherwise than those of a prompt
   ClampForwardEnd       where a step of a long prompt ends: at multiples of a constant, never where other prompts leave off
   RunRequiredAdmission  begins a scheduling pass: ClampForwardEnd counts what the pass has admitted

   Load it with RTLD_GLOBAL before anything that loads cuBLAS (torch does) and before TurboMind. cublasGemmEx carries the
   version "libcublas.so.12" (overrides.py links it so), hence no reference to another cuBLAS resolves to it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cublaslt.h"

#define EXPORT __attribute__((visibility("default")))
#define GET_SPLIT_COUNT "_ZN9turbomind13GetSplitCountEiiiiiff"
#define TOP_K_SORT "_ZN9turbomind20invokeTopKSortFilterIfEEvRNS_20TopKSortFilterParamsEP11CUstream_st"
#define TOP_K_OFFSET 40 /* of int32 max_top_k in TopKSortFilterParams, behind five pointers */
#define PLAN_RESUME "_ZN9turbomind9Scheduler10PlanResumeERNS_8SequenceE"
#define PROMPT_LEN_OFFSET 0x2c /* of int32 prompt_len in Sequence */
#define RESUME_LEN_OFFSET 0xf0 /* of int32 resume_len: the prompt tokens that are taken from the cache */
#define FORWARD_END "_ZNK9turbomind9Scheduler15ClampForwardEndERKNS_8SequenceEiii"
#define ADMISSION "_ZN9turbomind9Scheduler20RunRequiredAdmissionERNS0_13ScheduleStateERNS_8ResourceE"
#define LOWER_BOUND "_ZNK9turbomind4gemm13DispatchCache10LowerBoundERKNS0_8GemmDescE"
#define FOUND_OFFSET 0x28 /* of the flag in std::optional<LaunchSpec> */
#define IDS 16            /* permitted algorithms of one shape */
#define FASTEST 64        /* numbers of tokens for which the fastest of them is known */
#define SHAPES 64
#define TUNED 64          /* products that TurboMind's own kernels serve, and numbers of rows each was tuned for */
#define BUCKETS 65536

enum { STOCK, LEARN, SERVE };       /* what becomes of a product */
enum { UNWATCHED, WATCH, CORRECT }; /* what becomes of a resume */
enum { SPLIT, TOP_K, GEMM, RESUME, PIECE, LOOKUP, OVERRIDES }; /* places in the counters */
enum { NOT_SUPPORTED = 15 };        /* cublasStatus_t */

typedef struct { Shape shape; int32_t n_max, permitted, ids[IDS]; } Entry;
typedef struct { int32_t n, known; Algo algo; } Fast;
typedef struct Plan { Shape shape; int32_t n, rows, covered; Problem problem; Algo algo; struct Plan *next; } Plan;

typedef struct { int32_t kind[20], batch_dim, group_axis, m, n, k, num; } GemmDesc; /* m or n, by batch_dim, is the rows */
typedef struct { GemmDesc product; int32_t count, rows[TUNED]; } Kernels; /* product: with 0 rows */

EXPORT _Atomic uint64_t ost_calls[OVERRIDES], ost_plans, ost_uncovered, ost_corrected, ost_cuts, ost_strays, ost_pinned;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int mode, resume_mode;
static _Atomic int32_t resumed[2]; /* prompt_len and resume_len of the newest resume, as TurboMind planned it */
static _Atomic int32_t step[3]; /* begin, desired end and end of the newest step of a prompt, as TurboMind planned it */
static _Atomic int32_t piece, step_tokens, step_contexts; /* 0: TurboMind cuts prompts as it likes */
static _Atomic int kernel_count;
static Kernels kernels[TUNED];
static _Thread_local struct {
  const void *partial; /* the sequence of which this pass computes a piece, and more is to come */
  const void *before;  /* that of the last pass */
  const void *awaited; /* the same, if it is still there and this pass has not come to it */
  int32_t tokens, contexts; /* of prompts that this pass admitted */
} pass;
static char turbomind_path[4096];
static int splits, top_k, entry_count;
static Entry entries[SHAPES];
static Fast fastest[SHAPES][FASTEST]; /* of each entry, by rising n; the rest is 0 */
static Plan *table[BUCKETS];

/* ---- the originals ---- */

static void *original(const char *library, const char *name, void *mine) {
  void *there = *library ? dlopen(library, RTLD_NOLOAD | RTLD_LAZY) : NULL;
  void *found = there ? dlsym(there, name) : NULL; /* without a library this would find mine, and call it for ever */
  return found == mine ? NULL : found;
}

static struct { void *known; uintptr_t first, last; } code;

static int note_code(struct dl_phdr_info *info, size_t size, void *unused) {
  (void)size, (void)unused;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    uintptr_t first = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, last = first + info->dlpi_phdr[i].p_memsz;
    if (info->dlpi_phdr[i].p_type == PT_LOAD && first <= (uintptr_t)code.known && (uintptr_t)code.known < last)
      return code.first = first, code.last = last, 1;
  }
  return 0;
}

/* Others that use the same cuBLAS (torch, on a CUDA 12 host) get what they asked for, and count for nothing. */
static int from_turbomind(void *caller) {
  pthread_mutex_lock(&lock);
  if (!code.known && (code.known = original(turbomind_path, GET_SPLIT_COUNT, NULL))) dl_iterate_phdr(note_code, NULL);
  int inside = (uintptr_t)caller >= code.first && (uintptr_t)caller < code.last;
  pthread_mutex_unlock(&lock);
  return inside;
}

/* ---- shapes and plans, under the lock ---- */

static Entry *entry_of(const Shape *shape, int add) {
  for (int i = 0; i < entry_count; i++)
    if (!memcmp(&entries[i].shape, shape, sizeof *shape)) return &entries[i];
  if (!add || entry_count == SHAPES) return NULL;
  entries[entry_count] = (Entry){.shape = *shape};
  return &entries[entry_count++];
}

/* What was fastest for the next number of tokens that it was looked for at; NULL: what cublasLt likes best. */
static const Algo *fastest_of(const Entry *entry, int n) {
  for (const Fast *f = fastest[entry - entries], *end = f + FASTEST; f < end && f->n; f++)
    if (n <= f->n) return f->known ? &f->algo : NULL;
  return NULL;
}

static Plan *plan_of(const Shape *shape, int n) {
  uint32_t hash = 2166136261u ^ (uint32_t)n;
  for (size_t i = 0; i < sizeof *shape / 4; i++) hash = (hash ^ ((const uint32_t *)shape)[i]) * 16777619u;
  Plan **bucket = &table[(hash ^ hash >> 16) % BUCKETS];
  for (Plan *p = *bucket; p; p = p->next)
    if (p->n == n && !memcmp(&p->shape, shape, sizeof *shape)) return p;
  Plan *plan = calloc(1, sizeof *plan);
  if (!plan) abort();
  *plan = (Plan){.shape = *shape, .n = n, .rows = computed(shape, n), .next = *bucket};
  Entry *entry = entry_of(shape, 0);
  Device *here = entry && entry->permitted ? open_lt() : NULL;
  if (here && describe(shape, plan->rows, &plan->problem)) {
    Candidate offered[RESULTS];
    const Algo *fast = fastest_of(entry, plan->rows);
    if (fast && possible(here, shape, &plan->problem, fast)) plan->algo = *fast, plan->covered = 1;
    int count = plan->covered ? 0 : ask(here, &plan->problem, offered);
    for (int i = 0; i < count && !plan->covered; i++)
      for (int j = 0; j < entry->permitted && !plan->covered; j++)
        if (entry->ids[j] == offered[i].config[ALGO_ID] && possible(here, shape, &plan->problem, &offered[i].algo)) plan->algo = offered[i].algo, plan->covered = 1;
  }
  ost_plans++;
  return *bucket = plan;
}

/* ---- what TurboMind calls ---- */

/* The process ends without it. */
#define FIND(name, mine) if (!stock && !(*(void **)&stock = original(turbomind_path, name, (void *)mine))) abort()

EXPORT int split_count(int max, int grid, int active, int processors, int waves, float alpha, float beta) __asm__(GET_SPLIT_COUNT);
EXPORT int split_count(int max, int grid, int active, int processors, int waves, float alpha, float beta) {
  int (*stock)(int, int, int, int, int, float, float);
  ost_calls[SPLIT]++;
  if (splits) return max <= 1 ? 1 : splits; /* at most 1: a prompt, or every context fits one tile */
  *(void **)&stock = original(turbomind_path, GET_SPLIT_COUNT, (void *)split_count);
  return stock ? stock(max, grid, active, processors, waves, alpha, beta) : 1;
}

EXPORT void top_k_sort(char *params, void *stream) __asm__(TOP_K_SORT);
EXPORT void top_k_sort(char *params, void *stream) {
  static void (*stock)(char *, void *);
  FIND(TOP_K_SORT, top_k_sort); /* tokens drawn from what is not sorted would be wrong ones */
  int32_t *max_top_k = (int32_t *)(params + TOP_K_OFFSET);
  if (*max_top_k < top_k) *max_top_k = top_k;
  ost_calls[TOP_K]++;
  stock(params, stream);
}

/* The offsets are those of one build: they are watched at every start, and nothing is written through them before. */
EXPORT void plan_resume(void *scheduler, char *sequence) __asm__(PLAN_RESUME);
EXPORT void plan_resume(void *scheduler, char *sequence) {
  static void (*stock)(void *, char *);
  FIND(PLAN_RESUME, plan_resume); /* a sequence without a plan cannot be scheduled */
  stock(scheduler, sequence);
  ost_calls[RESUME]++;
  int now = resume_mode;
  if (now == UNWATCHED) return;
  int32_t prompt_len = *(int32_t *)(sequence + PROMPT_LEN_OFFSET), *resume_len = (int32_t *)(sequence + RESUME_LEN_OFFSET);
  resumed[0] = prompt_len, resumed[1] = *resume_len;
  if (now == CORRECT && *resume_len > 1 && prompt_len - *resume_len == 1) --*resume_len, ost_corrected++;
}

/* A pass begins with its sequences, a std::vector of pointers. */
typedef struct { const void **first, **last; } Pass;

static int in_pass(const Pass *state, const void *sequence) {
  for (const void **each = state->first; sequence && each < state->last; each++)
    if (*each == sequence) return 1;
  return 0;
}

EXPORT void admission(void *scheduler, Pass *state, void *resource) __asm__(ADMISSION);
EXPORT void admission(void *scheduler, Pass *state, void *resource) {
  static void (*stock)(void *, Pass *, void *);
  FIND(ADMISSION, admission); /* nothing would ever be scheduled */
  pass.before = pass.partial, pass.partial = NULL, pass.tokens = pass.contexts = 0;
  pass.awaited = in_pass(state, pass.before) ? pass.before : NULL; /* it may have been cancelled */
  stock(scheduler, state, resource);
}

/* Pieces end at multiples of `piece`. A piece of one token would go through the kernels of a decode: there is none. */
static int piece_end(int begin, int end, int size) {
  int next = (begin / size + 1) * size;
  if (next - begin < 2) next += size;
  return end - next < 2 ? end : next;
}

/* The step of a sequence from `begin`, of which TurboMind would admit the tokens up to `desired`, and which has `end`. A result
   of `begin` defers it. Sequences come by age, so a deferred prompt is the first new one of a later pass, and then fits. At most
   one prompt is in pieces at a time. Its next piece always fits, whatever else a pass admits: TurboMind would otherwise take it
   out of the batch. */
EXPORT int forward_end(const void *scheduler, const void *sequence, int begin, int desired, int end) __asm__(FORWARD_END);
EXPORT int forward_end(const void *scheduler, const void *sequence, int begin, int desired, int end) {
  static int (*stock)(const void *, const void *, int, int, int);
  FIND(FORWARD_END, forward_end); /* a step without an end cannot be scheduled */
  ost_calls[PIECE]++;
  int size = piece;
  if (end - begin > 1) step[0] = begin, step[1] = desired, step[2] = end;
  if (!size || end - begin <= 1) return stock(scheduler, sequence, begin, desired, end);
  int next = piece_end(begin, end, size), continued = sequence == pass.before;
  if (continued && !pass.awaited) ost_strays++; /* a pass of another build begins otherwise */
  if (continued) pass.awaited = NULL;
  int reserved = pass.awaited ? size + 2 : 0;
  int fits = pass.tokens + next - begin + reserved <= step_tokens && pass.contexts + end <= step_contexts;
  if (desired < next || (!continued && (!fits || (next < end && (pass.awaited || pass.partial))))) return begin;
  pass.tokens += next - begin;
  if (!continued) pass.contexts += end;
  if (next < end) pass.partial = sequence, ost_cuts++;
  return stock(scheduler, sequence, begin, next, end);
}

EXPORT void *lower_bound(char *out, const void *cache, const GemmDesc *desc) __asm__(LOWER_BOUND);
EXPORT void *lower_bound(char *out, const void *cache, const GemmDesc *desc) {
  static void *(*stock)(char *, const void *, const GemmDesc *);
  FIND(LOWER_BOUND, lower_bound); /* a product without a kernel would not be computed */
  ost_calls[LOOKUP]++;
  int count = kernel_count;
  GemmDesc other = *desc;
  int32_t *rows = other.batch_dim ? &other.n : &other.m, wanted = *rows;
  *rows = 0;
  for (int i = 0; i < count; i++) {
    const Kernels *known = &kernels[i];
    if (!known->count || memcmp(&known->product, &other, sizeof other)) continue;
    int place = 0;
    while (place < known->count - 1 && known->rows[place] < wanted) place++;
    *rows = known->rows[place];
    stock(out, cache, &other);
    if (!out[FOUND_OFFSET]) break;
    ost_pinned++;
    return out;
  }
  return stock(out, cache, desc);
}

EXPORT int cublasGemmEx(void *handle, int transa, int transb, int m, int n, int k, Const alpha, Const a, int a_type, int lda,
                        Const b, int b_type, int ldb, Const beta, void *c, int c_type, int ldc, int compute, int algo) {
  static int (*stock)(void *, int, int, int, int, int, Const, Const, int, int, Const, int, int, Const, void *, int, int, int, int);
  if (!stock) *(void **)&stock = original("libcublas.so.12", "cublasGemmEx", (void *)cublasGemmEx);
  int now = from_turbomind(__builtin_return_address(0)) ? mode : STOCK;
  if (now != STOCK) {
    Shape shape = {transa, transb, m, k, a_type, b_type, c_type, lda, ldb, ldc, compute};
    void *stream;
    pthread_mutex_lock(&lock);
    Entry *entry = entry_of(&shape, now == LEARN);
    if (entry && entry->n_max < n) entry->n_max = n;
    Plan *plan = now == SERVE ? plan_of(&shape, n) : NULL;
    Device *here = plan && plan->covered ? open_lt() : NULL;
    pthread_mutex_unlock(&lock);
    ost_calls[GEMM]++;
    if (here && !lt.stream(handle, &stream) &&
        !(plan->rows == n ? run(here, &plan->problem, &plan->algo, alpha, a, b, beta, c, stream)
                          : run_padded(here, &shape, &plan->problem, n, plan->rows, &plan->algo, alpha, a, b, beta, c, stream)))
      return 0;
    if (now == SERVE) ost_uncovered++;
  }
  if (!stock) return NOT_SUPPORTED;
  return stock(handle, transa, transb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algo);
}

/* ---- what the service calls, one thread at a time ---- */

/* Of the declarations in overrides.py. */
EXPORT int ost_abi(void) { return 4; }

/* Before TurboMind is loaded. `split` and `bucket` of 0 leave the stock behaviour; calls are counted all the same. */
EXPORT void ost_configure(const char *path, int split, int bucket) {
  strncpy(turbomind_path, path, sizeof turbomind_path - 1);
  splits = split, top_k = bucket;
}

EXPORT void ost_mode(int value) { mode = value; }

EXPORT void ost_resume(int value) { resume_mode = value; }

/* prompt_len and resume_len of the newest resume that was watched; 0 and 0: of none. */
EXPORT void ost_resumed(int32_t *out) { out[0] = resumed[0], out[1] = resumed[1]; }

/* Cut prompts into pieces of so many tokens. A step holds at most `tokens` of prompts, at least twice a piece and four, and of new
   prompts as many as have `contexts` tokens in all, at least the longest prompt. 0: as TurboMind likes. */
EXPORT void ost_pieces(int size, int tokens, int contexts) { step_tokens = tokens, step_contexts = contexts, piece = size; }

/* begin, desired end and end of the newest step of a prompt of more than one token. */
EXPORT void ost_step(int32_t *out) { out[0] = step[0], out[1] = step[1], out[2] = step[2]; }

/* Serve these products of TurboMind's own kernels with those that were tuned for the given numbers of rows, rising. Nothing may
   run meanwhile. 0: there is no room for them. */
EXPORT int ost_kernels(const Kernels *given, int count) {
  if (count > TUNED) return 0;
  kernel_count = 0;
  memcpy(kernels, given, (size_t)count * sizeof *given);
  kernel_count = count;
  return 1;
}

/* Memory on a device that products there may use. It must outlive them. */
EXPORT void ost_workspace(int device, void *memory, size_t bytes) {
  if (device >= 0 && device < DEVICES) devices[device].workspace = memory, devices[device].bytes = bytes;
}

/* The version of the cublasLt that serves on the current device and where it lies; 0: there is none. */
EXPORT size_t ost_open(const char **path) {
  Dl_info where;
  if (!open_lt()) return 0;
  *path = dladdr(*(void **)&lt.matmul, &where) ? where.dli_fname : "";
  return lt.version();
}

/* The shapes that were called in LEARN; returns their number. */
EXPORT int ost_shapes(Entry *out, int most) {
  pthread_mutex_lock(&lock);
  int count = entry_count < most ? entry_count : most;
  memcpy(out, entries, (size_t)count * sizeof *out);
  pthread_mutex_unlock(&lock);
  return count;
}

/* The algorithms that cublasLt offers for this product; returns their number. */
EXPORT int ost_offers(const Shape *shape, int n, Candidate *out) {
  Device *here = open_lt();
  Problem problem;
  return here && describe(shape, n, &problem) ? ask(here, &problem, out) : 0;
}

/* Run this product `times` with alpha 1 and beta 0, the weights being the next of `copies`, `stride` bytes apart, each time.
   0: it ran; 1: the algorithm cannot run it. */
EXPORT int ost_try(const Shape *shape, int n, const Algo *algo, int times, const char *a, size_t stride, int copies, Const b,
                   void *c, void *stream) {
  static Shape last;
  static int last_n;
  static Problem problem;
  const float one = 1, zero = 0;
  Device *here = open_lt();
  if (!here) return 1;
  if (memcmp(&last, shape, sizeof last) || last_n != n) {
    last_n = 0;
    if (!describe(shape, n, &problem)) return 1;
    last = *shape, last_n = n;
  }
  if (!possible(here, shape, &problem, algo)) return 1;
  for (int i = 0; i < times; i++)
    if (run(here, &problem, algo, &one, a + stride * (size_t)(i % copies), b, &zero, c, stream)) return 1;
  return 0;
}

/* Serve this shape with these algorithms. 0: there is no room for it. */
EXPORT int ost_permit(const Shape *shape, const int32_t *ids, int count) {
  pthread_mutex_lock(&lock);
  Entry *entry = count <= IDS ? entry_of(shape, 1) : NULL;
  if (entry) memcpy(entry->ids, ids, (size_t)count * sizeof *ids), entry->permitted = count;
  pthread_mutex_unlock(&lock);
  return entry != NULL;
}

/* Serve this shape, by rising n, with this permitted algorithm, or NULL for cublasLt's own, up to n tokens. 0: there is no room. */
EXPORT int ost_prefer(const Shape *shape, int n, const Algo *algo) {
  pthread_mutex_lock(&lock);
  Entry *entry = entry_of(shape, 0);
  int place = 0;
  while (entry && place < FASTEST && fastest[entry - entries][place].n) place++;
  if (entry && place < FASTEST) fastest[entry - entries][place] = (Fast){n, algo != NULL, algo ? *algo : (Algo){{0}}};
  pthread_mutex_unlock(&lock);
  return entry && place < FASTEST;
}

/* Make the plan for n tokens now. 1: it is covered. */
EXPORT int ost_cover(const Shape *shape, int n) {
  pthread_mutex_lock(&lock);
  int covered = plan_of(shape, n)->covered;
  pthread_mutex_unlock(&lock);
  return covered;
}
