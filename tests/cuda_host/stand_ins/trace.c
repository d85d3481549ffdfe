/* The trace, the lock, and the last error of a thread. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "runtime.h"

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static __thread cudaError_t last_error = cudaSuccess;

static FILE *trace(void) {
  static FILE *file;
  static int asked;
  if (!asked) {
    asked = 1;
    const char *path = getenv("STAND_IN_TRACE");
    if (path) file = fopen(path, "w");
  }
  return file;
}

void begin(void) { pthread_mutex_lock(&lock); }

cudaError_t finish(cudaError_t error) {
  if (error) last_error = error;
  pthread_mutex_unlock(&lock);
  return error;
}

int stand_in_record(const char *call, int error, const void *stream, size_t bytes, const char *words, ...) {
  begin();
  FILE *file = trace();
  if (file) {
    char name[16] = "-";
    if (stream != NO_STREAM) snprintf(name, sizeof name, "%d", stream_number(stream));
    fprintf(file, "%s\t%d\t%s\t%d\t%zu\t", call, error, name, stream != NO_STREAM && is_capturing(stream), bytes);
    va_list values;
    va_start(values, words);
    vfprintf(file, words, values);
    va_end(values);
    fputc('\n', file);
    if (error) fflush(file);
  }
  pthread_mutex_unlock(&lock);
  return error;
}

void stand_in_mark(const char *words) {
  stand_in_record("mark", 0, NO_STREAM, 0, "%s", words);
  if (trace()) fflush(trace()); /* what led to a crash is then read up to the last mark at least */
}

cudaError_t recorded(const char *call, cudaError_t error, const void *stream, size_t bytes, const char *words) {
  stand_in_record(call, error, stream, bytes, "%s", words);
  return finish(error);
}

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NAME(error) \
  case error:       \
    return #error
    NAME(cudaSuccess);
    NAME(cudaErrorInvalidValue);
    NAME(cudaErrorMemoryAllocation);
    NAME(cudaErrorInvalidConfiguration);
    NAME(cudaErrorInvalidResourceHandle);
    NAME(cudaErrorStreamCaptureUnsupported);
    NAME(cudaErrorStreamCaptureInvalidated);
    NAME(cudaErrorStreamCaptureImplicit);
    NAME(cudaErrorCapturedEvent);
#undef NAME
    default:
      return "cudaErrorUnknown";
  }
}

const char *cudaGetErrorString(cudaError_t error) {
  return error ? "refused by the stand-in, as a driver would" : "no error";
}
