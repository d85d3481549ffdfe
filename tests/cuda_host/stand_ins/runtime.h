/* Between the files of the stand-in of libcudart. */
#ifndef RUNTIME_H
#define RUNTIME_H

#include <cuda_runtime_api.h>

#include "stand_in.h"

/* Every call of the runtime takes the lock; `finish` notes the error as the thread's last one, and gives the lock back. */
void begin(void);
cudaError_t finish(cudaError_t error);
cudaError_t recorded(const char *call, cudaError_t error, const void *stream, size_t bytes, const char *words);

/* Streams and captures. Stream 0 is the legacy one. */
int stream_number(const void *stream);
int is_capturing(const void *stream);
void spoil_capture(const void *stream);
cudaError_t check_stream(const void *stream); /* is there such a stream, and may it be given work now? */
cudaError_t check_unsafe(void);               /* may this thread do now what no capture allows beside it? */

/* Memory. */
typedef enum { PAGEABLE, PINNED, DEVICE } Place;
Place place_of(const void *address, size_t bytes, int *whole);

/* Copies that page-locked memory may still be read by. A wait settles those of a stream, or of all, up to a place. */
long place_in_streams(void);
void add_pending(const void *source, size_t bytes, const void *stream);
void settle_pending(const void *stream, long place);
void forget_pending(const void *address, size_t bytes);

#endif
