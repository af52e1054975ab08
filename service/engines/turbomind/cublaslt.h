/* Products by way of cublasLt, with algorithms that sum up K in one go. Part of overrides.c. The numbers are those of
   cublasLt.h, where versions 12 and 13 agree. */
#include <dlfcn.h>
#include <stdint.h>

#define RESULTS 32 /* of one heuristic call */
#define DEVICES 16
#define NARROW 8 /* products with fewer outputs are computed for multiples of so many tokens */

enum { R_32F = 0 };                        /* cudaDataType_t */
enum { TRANSA = 3, TRANSB = 4 };           /* cublasLtMatmulDescAttributes_t */
enum { WORKSPACE_MAX = 1, REDUCTION = 3 }; /* cublasLtMatmulPreferenceAttributes_t */
/* cublasLtMatmulAlgoConfigAttributes_t; the last two have 16 bits */
enum { ALGO_ID, TILE, SPLIT_K, SCHEME, SWIZZLE, CUSTOM, STAGES, INNER, CLUSTER, CONFIG };

typedef const void *Const;
typedef struct { int32_t transa, transb, m, k, a_type, b_type, c_type, lda, ldb, ldc, compute; } Shape; /* all but n, the tokens */
typedef struct { uint64_t data[8]; } Algo;
typedef struct { Algo algo; int32_t config[CONFIG]; } Candidate;
typedef struct { Algo algo; size_t workspace; int32_t state; float waves; int32_t reserved[4]; } Result;
typedef struct { void *op, *a, *b, *c; } Problem;
typedef struct { void *handle, *workspace; size_t bytes; } Device;

static Device devices[DEVICES];

static struct {
  int complete;
  int (*device)(int *), (*copy)(void *, Const, size_t, void *), (*create)(void **), (*op_create)(void **, int, int), (*op_set)(void *, int, Const, size_t);
  int (*layout_create)(void **, int, uint64_t, uint64_t, int64_t), (*algo_get)(const Algo *, int, void *, size_t, size_t *);
  int (*wish_create)(void **), (*wish_set)(void *, int, Const, size_t), (*wish_destroy)(void *);
  int (*heuristic)(void *, void *, void *, void *, void *, void *, void *, int, Result *, int *);
  int (*check)(void *, void *, void *, void *, void *, void *, const Algo *, Result *);
  int (*matmul)(void *, void *, Const, Const, void *, Const, void *, Const, Const, void *, void *, void *, const Algo *, void *,
                size_t, void *);
  int (*stream)(void *, void **);
  size_t (*version)(void);
} lt;

/* A stand-in may have the name and not the function; prefer what is loaded already. */
static void *find(const char *const *names, const char *symbol) {
  for (int pass = 0; pass < 2; pass++)
    for (const char *const *name = names; *name; name++) {
      void *there = dlopen(*name, pass ? RTLD_LAZY : RTLD_NOLOAD | RTLD_LAZY), *found = there ? dlsym(there, symbol) : NULL;
      if (found) return found;
    }
  return NULL;
}

static int load_lt(void) {
  static const char *const driver[] = {"libcuda.so.1", NULL};
  static const char *const cublas[] = {"libcublas.so.12", "libcublas.so.13", NULL};
  static const char *const cublaslt[] = {"libcublasLt.so.12", "libcublasLt.so.13", NULL};
  const struct { const char *name; void *to; } wanted[] = {
      {"cublasLtCreate", &lt.create}, {"cublasLtMatmulDescCreate", &lt.op_create},
      {"cublasLtMatmulDescSetAttribute", &lt.op_set}, {"cublasLtMatrixLayoutCreate", &lt.layout_create},
      {"cublasLtMatmulPreferenceCreate", &lt.wish_create}, {"cublasLtMatmulPreferenceSetAttribute", &lt.wish_set},
      {"cublasLtMatmulPreferenceDestroy", &lt.wish_destroy}, {"cublasLtMatmulAlgoGetHeuristic", &lt.heuristic},
      {"cublasLtMatmulAlgoConfigGetAttribute", &lt.algo_get}, {"cublasLtMatmulAlgoCheck", &lt.check},
      {"cublasLtMatmul", &lt.matmul}, {"cublasLtGetVersion", &lt.version}};
  *(void **)&lt.device = find(driver, "cuCtxGetDevice");
  *(void **)&lt.copy = find(driver, "cuMemcpyDtoDAsync_v2");
  *(void **)&lt.stream = find(cublas, "cublasGetStream_v2");
  int complete = lt.stream != NULL;
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
    complete = (*(void **)wanted[i].to = find(cublaslt, wanted[i].name)) && complete;
  return complete;
}

/* The current device, with cublasLt open on it, or NULL. */
static Device *open_lt(void) {
  int number = 0;
  if (!lt.complete && !(lt.complete = load_lt())) return NULL;
  if (lt.device && lt.device(&number)) number = 0; /* no context yet: what the runtime makes one of */
  if (number < 0 || number >= DEVICES) return NULL;
  Device *d = &devices[number];
  if (!d->handle && lt.create(&d->handle)) d->handle = NULL;
  return d->handle ? d : NULL;
}

static int describe(const Shape *s, int n, Problem *p) {
  return !(lt.op_create(&p->op, s->compute, R_32F) || lt.op_set(p->op, TRANSA, &s->transa, sizeof s->transa) ||
           lt.op_set(p->op, TRANSB, &s->transb, sizeof s->transb) ||
           lt.layout_create(&p->a, s->a_type, s->transa ? s->k : s->m, s->transa ? s->m : s->k, s->lda) ||
           lt.layout_create(&p->b, s->b_type, s->transb ? n : s->k, s->transb ? s->k : n, s->ldb) ||
           lt.layout_create(&p->c, s->c_type, s->m, n, s->ldc));
}

/* Algorithms that sum up K in one go, best first by cublasLt's own reckoning; returns their number, at most RESULTS. */
static int ask(const Device *d, const Problem *p, Candidate *out) {
  void *wish;
  uint32_t no_scheme = 0;
  int count = 0, whole = 0;
  Result results[RESULTS];
  size_t written;
  if (lt.wish_create(&wish)) return 0;
  if (lt.wish_set(wish, WORKSPACE_MAX, &d->bytes, sizeof d->bytes) || lt.wish_set(wish, REDUCTION, &no_scheme, sizeof no_scheme) ||
      lt.heuristic(d->handle, p->op, p->a, p->b, p->c, p->c, wish, RESULTS, results, &count))
    count = 0;
  lt.wish_destroy(wish);
  for (int i = 0; i < count; i++) {
    Candidate c = {results[i].algo, {0}};
    for (int what = 0; what < CONFIG; what++)
      lt.algo_get(&c.algo, what, &c.config[what], what < INNER ? sizeof(int32_t) : sizeof(int16_t), &written);
    if (!results[i].state && c.config[SCHEME] == 0 && c.config[SPLIT_K] <= 1) out[whole++] = c;
  }
  return whole;
}

/* Whether an algorithm can run this product, which may be another one than it was offered for. */
static int possible(const Device *d, const Shape *s, const Problem *p, const Algo *algo) {
  Result r = {.workspace = 0};
  return !lt.check(d->handle, p->op, p->a, p->b, p->c, p->c, algo, &r) && r.workspace <= (s->m < NARROW ? 0 : d->bytes);
}

/* For products with few outputs cublasLt has other algorithms for other numbers of tokens: those are computed as the next multiple
   for which all have the same. */
static int computed(const Shape *s, int n) { return s->m < NARROW ? (n + NARROW - 1) / NARROW * NARROW : n; }

static int run(const Device *d, const Problem *p, const Algo *algo, Const alpha, Const a, Const b, Const beta, void *c,
               void *stream) {
  return lt.matmul(d->handle, p->op, alpha, a, p->a, b, p->b, beta, c, p->c, c, p->c, algo, d->workspace, d->bytes, stream);
}

static size_t bytes_of(int rows, int row, int type) { return ((size_t)rows * (size_t)row * (type == R_32F ? 4 : 2) + 255) / 256 * 256; }

/* n tokens, computed as `rows`: beside copies of their own inputs and outputs, which lie in the workspace. */
static int run_padded(const Device *d, const Shape *s, const Problem *p, int n, int rows, const Algo *algo, Const alpha, Const a,
                      Const b, const float *beta, void *c, void *stream) {
  size_t in = bytes_of(rows, s->ldb, s->b_type), out = bytes_of(rows, s->ldc, s->c_type);
  char *inputs = d->workspace, *outputs = inputs + in;
  if (!lt.copy || s->transb || *beta != 0 || in + out > d->bytes) return 1;
  return lt.copy(inputs, b, (size_t)n * (size_t)s->ldb * (s->b_type == R_32F ? 4 : 2), stream) ||
         lt.matmul(d->handle, p->op, alpha, a, p->a, inputs, p->b, beta, outputs, p->c, outputs, p->c, algo, NULL, 0, stream) ||
         lt.copy(c, outputs, (size_t)n * (size_t)s->ldc * (s->c_type == R_32F ? 4 : 2), stream);
}
