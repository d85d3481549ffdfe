/* Streams, events, captures and graphs. What a capture does not allow spoils it, as in a driver: its end then fails. */
#include <pthread.h>
#include <stdlib.h>

#include "runtime.h"

typedef struct Stream {
  struct Stream *next;
  int number;
  int non_blocking;
  struct Stream *origin; /* of the capture that this stream is part of; NULL: none */
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  int spoilt;
} Stream;

typedef struct {
  Stream *origin; /* recorded within this stream's capture */
  const void *stream;
  long place;
} Event;

static Stream *streams;
static int num_streams;

static Stream *find(const void *handle) {
  for (Stream *stream = streams; stream; stream = stream->next)
    if (stream == handle) return stream;
  return NULL;
}

static int is_legacy(const void *stream) { return stream == NULL || stream == (const void *)cudaStreamLegacy; }

int stream_number(const void *handle) {
  Stream *stream = find(handle);
  return stream ? stream->number : is_legacy(handle) ? 0 : -1;
}

int is_capturing(const void *handle) {
  Stream *stream = find(handle);
  return stream && stream->origin;
}

void spoil_capture(const void *handle) {
  Stream *stream = find(handle);
  if (stream && stream->origin) stream->origin->spoilt = 1;
}

static cudaError_t spoil_all(cudaError_t error) {
  for (Stream *stream = streams; stream; stream = stream->next) spoil_capture(stream);
  return error;
}

cudaError_t check_stream(const void *handle) {
  Stream *stream = find(handle);
  if (!stream && !is_legacy(handle)) return cudaErrorInvalidResourceHandle;
  if (stream) return stream->origin && stream->origin->spoilt ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
  for (Stream *other = streams; other; other = other->next) /* the legacy stream waits for every blocking one */
    if (other->origin && !other->non_blocking) return spoil_all(cudaErrorStreamCaptureImplicit);
  return cudaSuccess;
}

cudaError_t check_unsafe(void) {
  for (Stream *stream = streams; stream; stream = stream->next) {
    if (stream->origin != stream || stream->mode == cudaStreamCaptureModeRelaxed) continue;
    if (stream->mode == cudaStreamCaptureModeGlobal || pthread_equal(stream->thread, pthread_self()))
      return spoil_all(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *handle, unsigned flags) {
  begin();
  Stream *stream = calloc(1, sizeof *stream);
  stream->number = ++num_streams;
  stream->non_blocking = flags & cudaStreamNonBlocking;
  stream->next = streams;
  streams = stream;
  *handle = (cudaStream_t)stream;
  return recorded("cudaStreamCreate", cudaSuccess, stream, 0, stream->non_blocking ? "non-blocking" : "blocking");
}

cudaError_t cudaStreamCreate(cudaStream_t *handle) { return cudaStreamCreateWithFlags(handle, cudaStreamDefault); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  begin();
  cudaError_t error = cudaErrorInvalidResourceHandle;
  for (Stream **link = &streams; *link; link = &(*link)->next)
    if (*link == (Stream *)handle) {
      *link = (*link)->next; /* the struct stays, so that its address never names another stream */
      error = cudaSuccess;
      break;
    }
  return recorded("cudaStreamDestroy", error, NO_STREAM, 0, "");
}

/* Waiting for a stream that captures, or for all of them, is what a capture allows least. */
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  begin();
  cudaError_t error = check_stream(handle);
  if (!error && is_capturing(handle)) {
    spoil_capture(handle);
    error = cudaErrorStreamCaptureUnsupported;
  }
  if (!error) settle_pending(handle, place_in_streams());
  return recorded("cudaStreamSynchronize", error, handle, 0, "");
}

cudaError_t cudaDeviceSynchronize(void) {
  begin();
  cudaError_t error = cudaSuccess;
  for (Stream *stream = streams; stream; stream = stream->next)
    if (stream->origin) error = cudaErrorStreamCaptureUnsupported;
  if (error)
    spoil_all(error);
  else
    settle_pending(NO_STREAM, place_in_streams());
  return recorded("cudaDeviceSynchronize", error, NO_STREAM, 0, "");
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
  begin();
  Stream *stream = find(handle);
  *status = !stream || !stream->origin ? cudaStreamCaptureStatusNone
            : stream->origin->spoilt   ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
  return finish(cudaSuccess);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  static const char *modes[] = {"global", "thread local", "relaxed"};
  begin();
  Stream *stream = find(handle);
  cudaError_t error = cudaSuccess;
  if (!stream) error = is_legacy(handle) ? cudaErrorStreamCaptureUnsupported : cudaErrorInvalidResourceHandle;
  if (stream && stream->origin) error = cudaErrorStreamCaptureUnsupported;
  if (!error) {
    stream->origin = stream;
    stream->mode = mode;
    stream->thread = pthread_self();
    stream->spoilt = 0;
  }
  return recorded("cudaStreamBeginCapture", error, handle, 0, modes[mode]);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
  begin();
  Stream *origin = find(handle);
  cudaError_t error = cudaSuccess;
  if (!origin || origin->origin != origin) error = cudaErrorInvalidValue;
  if (!error && origin->spoilt) error = cudaErrorStreamCaptureInvalidated;
  for (Stream *stream = streams; origin && stream; stream = stream->next)
    if (stream != origin && stream->origin == origin) stream->origin = NULL;
  if (origin) origin->origin = NULL;
  *graph = error ? NULL : malloc(1);
  return recorded("cudaStreamEndCapture", error, handle, 0, "");
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *instance, cudaGraph_t graph, unsigned long long flags) {
  (void)flags;
  begin();
  *instance = graph ? malloc(1) : NULL;
  return recorded("cudaGraphInstantiate", graph ? cudaSuccess : cudaErrorInvalidValue, NO_STREAM, 0, "");
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t handle) {
  begin();
  cudaError_t error = check_stream(handle);
  if (!instance) error = cudaErrorInvalidValue;
  return recorded("cudaGraphLaunch", error, handle, 0, "");
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  free(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) {
  free(instance);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  (void)flags;
  *event = calloc(1, sizeof(Event));
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags) {
  (void)flags;
  begin();
  cudaError_t error = check_stream(handle);
  Stream *stream = find(handle);
  if (!error) *(Event *)event = (Event){stream ? stream->origin : NULL, handle, place_in_streams()};
  return recorded("cudaEventRecord", error, handle, 0, "");
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  return cudaEventRecordWithFlags(event, handle, cudaEventRecordDefault);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  begin();
  Stream *origin = ((Event *)event)->origin;
  if (origin)
    origin->spoilt = 1;
  else
    settle_pending(((Event *)event)->stream, ((Event *)event)->place);
  return recorded("cudaEventSynchronize", origin ? cudaErrorCapturedEvent : cudaSuccess, NO_STREAM, 0, "");
}

/* A stream that waits for a captured event joins its capture. */
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  (void)flags;
  begin();
  cudaError_t error = check_stream(handle);
  Stream *stream = find(handle), *origin = ((Event *)event)->origin;
  if (!error && stream && origin) stream->origin = origin;
  if (!error && !stream && origin) error = spoil_all(cudaErrorStreamCaptureImplicit);
  return recorded("cudaStreamWaitEvent", error, handle, 0, "");
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  (void)start, (void)end;
  *ms = 1.0f;
  return cudaSuccess;
}

/* The host function of a stream runs at once, as everything else does. */
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *data) {
  begin();
  cudaError_t error = check_stream(handle);
  int captured = is_capturing(handle);
  recorded("cudaLaunchHostFunc", error, handle, 0, "");
  if (!error && !captured) function(data);
  return error;
}
