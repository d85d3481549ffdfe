/* Memory, all of it the host's: what is malloced is zero, and every block is known, so that a copy can be judged. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

#define TOTAL_BYTES ((size_t)80 << 30)

typedef struct {
  char *address;
  size_t bytes;
  Place place;
} Block;

static Block *blocks;
static size_t num_blocks, room, device_bytes;

static Block *block_of(const void *address) {
  for (size_t i = 0; i < num_blocks; i++)
    if ((const char *)address >= blocks[i].address && (const char *)address < blocks[i].address + blocks[i].bytes)
      return &blocks[i];
  return NULL;
}

Place place_of(const void *address, size_t bytes, int *whole) {
  Block *block = block_of(address);
  if (whole) *whole = !block || (const char *)address + bytes <= block->address + block->bytes;
  return block ? block->place : PAGEABLE;
}

static cudaError_t make_block(void **address, size_t bytes, Place place) {
  if (!bytes) {
    *address = NULL;
    return cudaSuccess;
  }
  void *made = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return cudaErrorMemoryAllocation;
  if (num_blocks == room) blocks = realloc(blocks, (room = 2 * room + 64) * sizeof *blocks);
  blocks[num_blocks++] = (Block){made, bytes, place};
  if (place == DEVICE) device_bytes += bytes;
  *address = made;
  return cudaSuccess;
}

static cudaError_t drop_block(void *address, size_t *bytes) {
  *bytes = 0;
  if (!address) return cudaSuccess;
  Block *block = block_of(address);
  if (!block || block->address != address) return cudaErrorInvalidValue;
  *bytes = block->bytes;
  if (block->place == DEVICE) device_bytes -= block->bytes;
  if (block->place == PINNED) forget_pending(block->address, block->bytes);
  munmap(block->address, block->bytes);
  *block = blocks[--num_blocks];
  return cudaSuccess;
}

static cudaError_t allocate(const char *call, void **address, size_t bytes, Place place) {
  begin();
  cudaError_t error = check_unsafe();
  if (!error) error = make_block(address, bytes, place);
  return recorded(call, error, NO_STREAM, bytes, "");
}

static cudaError_t release(const char *call, void *address) {
  begin();
  size_t bytes = 0;
  cudaError_t error = address ? check_unsafe() : cudaSuccess;
  if (!error) error = drop_block(address, &bytes);
  return recorded(call, error, NO_STREAM, bytes, "");
}

cudaError_t cudaMalloc(void **address, size_t bytes) { return allocate("cudaMalloc", address, bytes, DEVICE); }
cudaError_t cudaFree(void *address) { return release("cudaFree", address); }

cudaError_t cudaMallocHost(void **address, size_t bytes) {
  return allocate("cudaMallocHost", address, bytes, PINNED);
}

cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
  (void)flags;
  return allocate("cudaHostAlloc", address, bytes, PINNED);
}

cudaError_t cudaFreeHost(void *address) { return release("cudaFreeHost", address); }

cudaError_t cudaMallocFromPoolAsync(void **address, size_t bytes, cudaMemPool_t pool, cudaStream_t stream) {
  (void)pool;
  begin();
  cudaError_t error = check_stream(stream);
  if (!error) error = make_block(address, bytes, DEVICE);
  return recorded("cudaMallocFromPoolAsync", error, stream, bytes, "");
}

cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) {
  begin();
  size_t bytes;
  cudaError_t error = check_stream(stream);
  if (!error) error = drop_block(address, &bytes);
  return recorded("cudaFreeAsync", error, stream, bytes, "");
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  *total_bytes = TOTAL_BYTES;
  *free_bytes = TOTAL_BYTES - device_bytes;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
  static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
  begin();
  Place place = place_of(address, 1, NULL);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = types[place];
  attributes->devicePointer = place == PAGEABLE ? NULL : (void *)address;
  attributes->hostPointer = place == PINNED ? (void *)address : NULL;
  return finish(cudaSuccess);
}

/* A copy, checked: does each side lie where its kind says, and within one block? Returns the words of the record. */
static cudaError_t check_copy(
    const void *target, const void *source, size_t target_bytes, size_t source_bytes, enum cudaMemcpyKind kind, char words[32]
) {
  static const char *names[] = {"host", "pinned", "device"};
  int target_whole, source_whole;
  Place to = place_of(target, target_bytes, &target_whole), from = place_of(source, source_bytes, &source_whole);
  snprintf(words, 32, "%s to %s", names[from], names[to]);
  if (!target_bytes) return cudaSuccess;
  int to_device = to == DEVICE, from_device = from == DEVICE;
  int wrong = (kind == cudaMemcpyHostToDevice && (!to_device || from_device)) ||
              (kind == cudaMemcpyDeviceToHost && (to_device || !from_device)) ||
              (kind == cudaMemcpyDeviceToDevice && !(to_device && from_device)) ||
              (kind == cudaMemcpyHostToHost && (to_device || from_device));
  return wrong || !target_whole || !source_whole ? cudaErrorInvalidValue : cudaSuccess;
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t bytes, enum cudaMemcpyKind kind) {
  begin();
  char words[32];
  cudaError_t error = check_copy(target, source, bytes, bytes, kind, words);
  if (!error) error = check_stream(0);
  if (!error) error = check_unsafe();
  if (!error) memcpy(target, source, bytes);
  return recorded("cudaMemcpy", error, 0, bytes, words);
}

/* A graph that reads or writes pageable memory would do so at every replay, when the memory may be another's. */
static cudaError_t check_captured_copy(const void *target, const void *source, cudaStream_t stream) {
  int pageable = place_of(target, 1, NULL) == PAGEABLE || place_of(source, 1, NULL) == PAGEABLE;
  if (!is_capturing(stream) || !pageable) return cudaSuccess;
  spoil_capture(stream);
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaMemcpyAsync(
    void *target, const void *source, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream
) {
  begin();
  char words[32];
  cudaError_t error = check_copy(target, source, bytes, bytes, kind, words);
  if (!error) error = check_stream(stream);
  if (!error) error = check_captured_copy(target, source, stream);
  if (!error && !is_capturing(stream)) {
    memcpy(target, source, bytes);
    if (place_of(source, 1, NULL) == PINNED) add_pending(source, bytes, stream);
  }
  return recorded("cudaMemcpyAsync", error, stream, bytes, words);
}

cudaError_t cudaMemcpy2DAsync(
    void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width, size_t height,
    enum cudaMemcpyKind kind, cudaStream_t stream
) {
  begin();
  char words[32];
  size_t last = height ? height - 1 : 0;
  cudaError_t error =
      check_copy(target, source, last * target_pitch + width, last * source_pitch + width, kind, words);
  if (!error && (width > target_pitch || width > source_pitch)) error = cudaErrorInvalidValue;
  if (!error) error = check_stream(stream);
  if (!error) error = check_captured_copy(target, source, stream);
  if (!error && !is_capturing(stream))
    for (size_t row = 0; row < height; row++)
      memcpy((char *)target + row * target_pitch, (const char *)source + row * source_pitch, width);
  return recorded("cudaMemcpy2DAsync", error, stream, width * height, words);
}

/* Symbols of kernels have no memory here: they read as zero. */
cudaError_t cudaMemcpyFromSymbol(
    void *target, const void *symbol, size_t bytes, size_t offset, enum cudaMemcpyKind kind
) {
  (void)symbol, (void)offset, (void)kind;
  begin();
  cudaError_t error = check_unsafe();
  if (!error) memset(target, 0, bytes);
  return recorded("cudaMemcpyFromSymbol", error, 0, bytes, "");
}

static cudaError_t fill(const char *call, void *target, int value, size_t bytes, cudaStream_t stream) {
  begin();
  int whole;
  cudaError_t error = place_of(target, bytes, &whole) == DEVICE && whole ? cudaSuccess : cudaErrorInvalidValue;
  if (!bytes) error = cudaSuccess;
  if (!error) error = check_stream(stream);
  if (!error && !is_capturing(stream)) memset(target, value, bytes);
  return recorded(call, error, stream, bytes, "");
}

cudaError_t cudaMemset(void *target, int value, size_t bytes) { return fill("cudaMemset", target, value, bytes, 0); }

cudaError_t cudaMemsetAsync(void *target, int value, size_t bytes, cudaStream_t stream) {
  return fill("cudaMemsetAsync", target, value, bytes, stream);
}

/* Pools, which the provider makes only when asked for. */
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *properties) {
  (void)properties;
  *pool = malloc(1);
  return cudaSuccess;
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  free(pool);
  return cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
  (void)pool, (void)attribute;
  *(unsigned long long *)value = 0;
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
  (void)pool, (void)attribute, (void)value;
  return cudaSuccess;
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t bytes) {
  (void)pool, (void)bytes;
  return cudaSuccess;
}
