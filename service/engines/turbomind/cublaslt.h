/* Products by way of cublasLt, with algorithms that sum up K in one go. Part of overrides.c. The numbers are those of
   cublasLt.h, where versions 12 and 13 agree. */
#include <dlfcn.h>
#include <stdint.h>

#define RESULTS 32 /* of one heuristic call */

enum { R_32F = 0 };                        /* cudaDataType_t */
enum { TRANSA = 3, TRANSB = 4 };           /* cublasLtMatmulDescAttributes_t */
enum { WORKSPACE_MAX = 1, REDUCTION = 3 }; /* cublasLtMatmulPreferenceAttributes_t */
enum { ALGO_ID, TILE, SPLIT_K, SCHEME };   /* cublasLtMatmulAlgoConfigAttributes_t */

typedef const void *Const;
typedef struct { int32_t transa, transb, m, k, a_type, b_type, c_type, lda, ldb, ldc, compute; } Shape; /* all but n, the tokens */
typedef struct { int32_t id, tile, split_k, scheme; } Candidate;
typedef struct { uint64_t data[8]; } Algo;
typedef struct { Algo algo; size_t workspace; int32_t state; float waves; int32_t reserved[4]; } Result;
typedef struct { void *op, *a, *b, *c; } Problem;

static void *workspace;
static size_t workspace_bytes;

static struct {
  void *handle;
  int (*create)(void **), (*op_create)(void **, int, int), (*op_set)(void *, int, Const, size_t);
  int (*layout_create)(void **, int, uint64_t, uint64_t, int64_t), (*algo_get)(const Algo *, int, void *, size_t, size_t *);
  int (*wish_create)(void **), (*wish_set)(void *, int, Const, size_t), (*wish_destroy)(void *);
  int (*heuristic)(void *, void *, void *, void *, void *, void *, void *, int, Result *, int *);
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

static int open_lt(void) {
  static const char *const cublas[] = {"libcublas.so.12", "libcublas.so.13", NULL};
  static const char *const cublaslt[] = {"libcublasLt.so.12", "libcublasLt.so.13", NULL};
  const struct { const char *name; void *to; } wanted[] = {
      {"cublasLtCreate", &lt.create}, {"cublasLtMatmulDescCreate", &lt.op_create},
      {"cublasLtMatmulDescSetAttribute", &lt.op_set}, {"cublasLtMatrixLayoutCreate", &lt.layout_create},
      {"cublasLtMatmulPreferenceCreate", &lt.wish_create}, {"cublasLtMatmulPreferenceSetAttribute", &lt.wish_set},
      {"cublasLtMatmulPreferenceDestroy", &lt.wish_destroy}, {"cublasLtMatmulAlgoGetHeuristic", &lt.heuristic},
      {"cublasLtMatmulAlgoConfigGetAttribute", &lt.algo_get}, {"cublasLtMatmul", &lt.matmul},
      {"cublasLtGetVersion", &lt.version}};
  if (lt.handle) return 1;
  *(void **)&lt.stream = find(cublas, "cublasGetStream_v2");
  int complete = lt.stream != NULL;
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
    complete = (*(void **)wanted[i].to = find(cublaslt, wanted[i].name)) && complete;
  if (!complete || lt.create(&lt.handle)) lt.handle = NULL;
  return lt.handle != NULL;
}

static int describe(const Shape *s, int n, Problem *p) {
  return !(lt.op_create(&p->op, s->compute, R_32F) || lt.op_set(p->op, TRANSA, &s->transa, sizeof s->transa) ||
           lt.op_set(p->op, TRANSB, &s->transb, sizeof s->transb) ||
           lt.layout_create(&p->a, s->a_type, s->transa ? s->k : s->m, s->transa ? s->m : s->k, s->lda) ||
           lt.layout_create(&p->b, s->b_type, s->transb ? n : s->k, s->transb ? s->k : n, s->ldb) ||
           lt.layout_create(&p->c, s->c_type, s->m, n, s->ldc));
}

/* How many algorithms there are without a reduction across parts of K, best first. */
static int ask(const Problem *p, Result *results) {
  void *wish;
  uint32_t no_scheme = 0;
  int count = 0;
  if (lt.wish_create(&wish)) return 0;
  int failed = lt.wish_set(wish, WORKSPACE_MAX, &workspace_bytes, sizeof workspace_bytes) ||
               lt.wish_set(wish, REDUCTION, &no_scheme, sizeof no_scheme) ||
               lt.heuristic(lt.handle, p->op, p->a, p->b, p->c, p->c, wish, RESULTS, results, &count);
  lt.wish_destroy(wish);
  return failed ? 0 : count;
}

/* Whether it can run and sums up K in one go. */
static int whole(const Result *r, Candidate *c) {
  size_t n;
  *c = (Candidate){-1, -1, -1, -1};
  lt.algo_get(&r->algo, ALGO_ID, &c->id, sizeof c->id, &n), lt.algo_get(&r->algo, TILE, &c->tile, sizeof c->tile, &n);
  lt.algo_get(&r->algo, SPLIT_K, &c->split_k, sizeof c->split_k, &n);
  lt.algo_get(&r->algo, SCHEME, &c->scheme, sizeof c->scheme, &n);
  return !r->state && c->scheme == 0 && c->split_k <= 1;
}

static int run(const Problem *p, const Algo *algo, Const alpha, Const a, Const b, Const beta, void *c, void *stream) {
  return lt.matmul(lt.handle, p->op, alpha, a, p->a, b, p->b, beta, c, p->c, c, p->c, algo, workspace, workspace_bytes, stream);
}
