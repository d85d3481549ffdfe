/* cuBLASLt: the products of fused biases and of packed weights. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "stand_in.h"

enum { SUCCESS = 0, INVALID_VALUE = 7 };

typedef struct {
  int type;
  uint64_t rows, columns;
  int64_t leading;
} Layout;

typedef struct {
  int compute;
} Description;

typedef struct { /* cublasLtMatmulHeuristicResult_t */
  uint64_t algorithm[8];
  size_t workspace_bytes;
  int state;
  float waves;
  int reserved[4];
} Heuristic;

int cublasLtCreate(void **handle) {
  *handle = malloc(1);
  return SUCCESS;
}

int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  *layout = malloc(sizeof **layout);
  **layout = (Layout){type, rows, columns, leading};
  return SUCCESS;
}

int cublasLtMatmulDescCreate(Description **description, int compute, int scale_type) {
  (void)scale_type;
  *description = malloc(sizeof **description);
  (*description)->compute = compute;
  return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(void **preference) {
  *preference = malloc(1);
  return SUCCESS;
}

#define DESTROY(name)      \
  int name(void *object) { \
    free(object);          \
    return SUCCESS;        \
  }
DESTROY(cublasLtDestroy)
DESTROY(cublasLtMatrixLayoutDestroy)
DESTROY(cublasLtMatmulDescDestroy)
DESTROY(cublasLtMatmulPreferenceDestroy)

#define ACCEPT(name)                                                               \
  int name(void *object, int attribute, const void *value, size_t bytes) {         \
    (void)object, (void)attribute, (void)value, (void)bytes;                       \
    return SUCCESS;                                                                \
  }
ACCEPT(cublasLtMatrixLayoutSetAttribute)
ACCEPT(cublasLtMatmulDescSetAttribute)
ACCEPT(cublasLtMatmulPreferenceSetAttribute)
ACCEPT(cublasLtMatmulAlgoConfigSetAttribute)

int cublasLtMatmulAlgoGetHeuristic(
    void *handle, Description *description, Layout *a, Layout *b, Layout *c, Layout *d, void *preference, int wanted,
    Heuristic *results, int *found
) {
  (void)handle, (void)description, (void)a, (void)b, (void)c, (void)preference, (void)wanted;
  memset(results, 0, sizeof *results);
  *found = d->rows && d->columns;
  return *found ? SUCCESS : stand_in_record(__func__, INVALID_VALUE, NO_STREAM, 0, "an empty product");
}

int cublasLtMatmul(
    void *handle, Description *description, const void *alpha, const void *a_data, Layout *a, const void *b_data,
    Layout *b, const void *beta, const void *c_data, Layout *c, void *d_data, Layout *d, const void *algorithm,
    void *workspace, size_t workspace_bytes, void *stream
) {
  (void)handle, (void)alpha, (void)a_data, (void)b_data, (void)beta, (void)c_data, (void)c, (void)d_data;
  (void)algorithm, (void)workspace;
  int wrong = !d->rows || !d->columns || d->leading < 1;
  return stand_in_record(
      "cublasLtMatmul", wrong ? INVALID_VALUE : SUCCESS, stream, workspace_bytes,
      "m %lu n %lu k %lu batch 1 types %d %d %d compute %d mode 0", d->rows, d->columns, a->rows, a->type, b->type,
      d->type, description->compute
  );
}

/* Linked, and used by nothing that a bundle has: a call shows as an error. */
#define UNUSED(name) \
  int name(void) { return stand_in_record(#name, INVALID_VALUE, NO_STREAM, 0, "not expected"); }
UNUSED(cublasLtMatmulAlgoInit)
UNUSED(cublasLtMatrixTransform)
UNUSED(cublasLtMatrixTransformDescCreate)
UNUSED(cublasLtMatrixTransformDescDestroy)
