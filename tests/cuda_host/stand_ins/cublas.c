/* cuBLAS: products are checked, recorded with types and mode, and not computed. No header: its wheel weighs 400 MB. */
#include <stdint.h>
#include <stdlib.h>

#include "stand_in.h"

enum { SUCCESS = 0, INVALID_VALUE = 7 };
enum { FLOAT32 = 0 };       /* cudaDataType_t */
enum { COMPUTE_32F = 68 };  /* cublasComputeType_t */

typedef struct {
  void *stream;
  int math_mode;
} Handle;

/* `compute` with the handle's mode decides whether float32 is multiplied as TF32; whoever reads the trace judges. */
static int product(
    const char *call, Handle *handle, int m, int n, int k, int lda, int ldb, int ldc, int batch, int type_a, int type_b,
    int type_c, int compute
) {
  int wrong = m < 0 || n < 0 || k < 0 || batch < 0 || lda < 1 || ldb < 1 || ldc < 1;
  return stand_in_record(
      call, wrong ? INVALID_VALUE : SUCCESS, handle->stream, 0,
      "m %d n %d k %d batch %d types %d %d %d compute %d mode %d", m, n, k, batch, type_a, type_b, type_c, compute,
      handle->math_mode
  );
}

int cublasCreate_v2(Handle **handle) {
  *handle = calloc(1, sizeof **handle);
  return SUCCESS;
}

int cublasDestroy_v2(Handle *handle) {
  free(handle);
  return SUCCESS;
}

int cublasSetStream_v2(Handle *handle, void *stream) {
  handle->stream = stream;
  return SUCCESS;
}

int cublasGetMathMode(Handle *handle, int *mode) {
  *mode = handle->math_mode;
  return SUCCESS;
}

int cublasSetMathMode(Handle *handle, int mode) {
  handle->math_mode = mode;
  return SUCCESS;
}

const char *cublasGetStatusName(int status) { return status ? "CUBLAS_STATUS_INVALID_VALUE" : "CUBLAS_STATUS_SUCCESS"; }
const char *cublasGetStatusString(int status) { return status ? "refused by the stand-in" : "success"; }

int cublasGemmEx(
    Handle *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int type_a, int lda,
    const void *b, int type_b, int ldb, const void *beta, void *c, int type_c, int ldc, int compute, int algorithm
) {
  (void)op_a, (void)op_b, (void)alpha, (void)a, (void)b, (void)beta, (void)c, (void)algorithm;
  return product("cublasGemmEx", handle, m, n, k, lda, ldb, ldc, 1, type_a, type_b, type_c, compute);
}

int cublasGemmStridedBatchedEx(
    Handle *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int type_a, int lda,
    long long stride_a, const void *b, int type_b, int ldb, long long stride_b, const void *beta, void *c, int type_c,
    int ldc, long long stride_c, int batch, int compute, int algorithm
) {
  (void)op_a, (void)op_b, (void)alpha, (void)a, (void)stride_a, (void)b, (void)stride_b, (void)beta, (void)c;
  (void)stride_c, (void)algorithm;
  return product("cublasGemmStridedBatchedEx", handle, m, n, k, lda, ldb, ldc, batch, type_a, type_b, type_c, compute);
}

int cublasGemmBatchedEx(
    Handle *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *const a[], int type_a,
    int lda, const void *const b[], int type_b, int ldb, const void *beta, void *const c[], int type_c, int ldc,
    int batch, int compute, int algorithm
) {
  (void)op_a, (void)op_b, (void)alpha, (void)a, (void)b, (void)beta, (void)c, (void)algorithm;
  return product("cublasGemmBatchedEx", handle, m, n, k, lda, ldb, ldc, batch, type_a, type_b, type_c, compute);
}

int cublasSgemm_v2(
    Handle *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int lda, const void *b,
    int ldb, const void *beta, void *c, int ldc
) {
  (void)op_a, (void)op_b, (void)alpha, (void)a, (void)b, (void)beta, (void)c;
  return product("cublasSgemm", handle, m, n, k, lda, ldb, ldc, 1, FLOAT32, FLOAT32, FLOAT32, COMPUTE_32F);
}

int cublasSgemmStridedBatched(
    Handle *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int lda,
    long long stride_a, const void *b, int ldb, long long stride_b, const void *beta, void *c, int ldc,
    long long stride_c, int batch
) {
  (void)op_a, (void)op_b, (void)alpha, (void)a, (void)stride_a, (void)b, (void)stride_b, (void)beta, (void)c;
  (void)stride_c;
  return product(
      "cublasSgemmStridedBatched", handle, m, n, k, lda, ldb, ldc, batch, FLOAT32, FLOAT32, FLOAT32, COMPUTE_32F
  );
}

int cublasSgemmBatched(
    Handle *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *const a[], int lda,
    const void *const b[], int ldb, const void *beta, void *const c[], int ldc, int batch
) {
  (void)op_a, (void)op_b, (void)alpha, (void)a, (void)b, (void)beta, (void)c;
  return product("cublasSgemmBatched", handle, m, n, k, lda, ldb, ldc, batch, FLOAT32, FLOAT32, FLOAT32, COMPUTE_32F);
}

/* Linked, and used by nothing that a bundle has: a call shows as an error. */
#define UNUSED(name) \
  int name(void) { return stand_in_record(#name, INVALID_VALUE, NO_STREAM, 0, "not expected"); }
UNUSED(cublasDgeam)
UNUSED(cublasDgemmBatched)
UNUSED(cublasDgemmStridedBatched)
UNUSED(cublasDgemm_v2)
UNUSED(cublasDgetrfBatched)
UNUSED(cublasDgetriBatched)
UNUSED(cublasScopy_v2)
UNUSED(cublasSgeam)
UNUSED(cublasSgetrfBatched)
UNUSED(cublasSgetriBatched)
UNUSED(cublasSscal_v2)
