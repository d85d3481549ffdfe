/* Kernels, which are registered by name, launched with a checked configuration, and do nothing. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

#define MAX_THREADS 1024
#define MAX_GRID_X 2147483647u
#define MAX_GRID_YZ 65535u
#define SHARED_BYTES 49152           /* dynamic shared memory that a kernel gets unasked */
#define MAX_SHARED_BYTES (227 << 10) /* and what it may ask for, compute capability 9.0 */

typedef struct Kernel {
  struct Kernel *next;
  const void *key; /* address of the host's stub */
  const char *name;
  size_t shared_bytes;
} Kernel;

static Kernel *kernels[1 << 16];

static Kernel **bucket(const void *key) {
  return &kernels[((uintptr_t)key * 0x9E3779B97F4A7C15u) >> 48];
}

static Kernel *find_kernel(const void *key) {
  for (Kernel *kernel = *bucket(key); kernel; kernel = kernel->next)
    if (kernel->key == key) return kernel;
  return NULL;
}

static void add_kernel(const void *key, const char *name) {
  Kernel *kernel = malloc(sizeof *kernel);
  *kernel = (Kernel){*bucket(key), key, strdup(name), SHARED_BYTES};
  *bucket(key) = kernel;
}

/* What a library does when it is loaded. */
void **__cudaRegisterFatBinary(void *binary) { return binary; }
void __cudaRegisterFatBinaryEnd(void **binary) { (void)binary; }
void __cudaUnregisterFatBinary(void **binary) { (void)binary; }

void __cudaRegisterFunction(
    void **binary, const char *stub, char *device_stub, const char *name, int thread_limit, void *tid, void *bid,
    void *block, void *grid, int *warp_size
) {
  (void)binary, (void)device_stub, (void)thread_limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp_size;
  add_kernel(stub, name);
}

void __cudaRegisterVar(
    void **binary, char *variable, char *device_address, const char *name, int external, size_t bytes, int constant,
    int global
) {
  (void)binary, (void)variable, (void)device_address, (void)name, (void)external, (void)bytes, (void)constant;
  (void)global;
}

cudaError_t cudaLibraryLoadData(
    cudaLibrary_t *library, const void *code, enum cudaJitOption *jit_options, void **jit_values, unsigned num_jit,
    enum cudaLibraryOption *options, void **values, unsigned num_options
) {
  (void)code, (void)jit_options, (void)jit_values, (void)num_jit, (void)options, (void)values, (void)num_options;
  *library = malloc(1);
  return cudaSuccess;
}

cudaError_t cudaLibraryUnload(cudaLibrary_t library) {
  free(library);
  return cudaSuccess;
}

cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
  (void)library;
  begin();
  *kernel = malloc(1);
  add_kernel(*kernel, name);
  return finish(cudaSuccess);
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *stub) {
  *kernel = (cudaKernel_t)stub;
  return cudaSuccess;
}

/* <<<grid, block, shared, stream>>> is put down here and picked up by the stub that it calls. */
typedef struct {
  dim3 grid, block;
  size_t shared_bytes;
  void *stream;
} Configuration;

static __thread Configuration pushed[16];
static __thread int num_pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void *stream) {
  pushed[num_pushed++] = (Configuration){grid, block, shared_bytes, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void *stream) {
  Configuration *top = &pushed[--num_pushed];
  *grid = top->grid;
  *block = top->block;
  *shared_bytes = top->shared_bytes;
  *(void **)stream = top->stream;
  return cudaSuccess;
}

static cudaError_t check_configuration(const Kernel *kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > MAX_GRID_X || grid.y > MAX_GRID_YZ || grid.z > MAX_GRID_YZ)
    return cudaErrorInvalidConfiguration;
  if (!threads || threads > MAX_THREADS || block.z > 64) return cudaErrorInvalidConfiguration;
  return shared_bytes > kernel->shared_bytes ? cudaErrorInvalidValue : cudaSuccess;
}

static cudaError_t launch(
    const char *call, const void *key, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream
) {
  begin();
  Kernel *kernel = find_kernel(key);
  cudaError_t error = kernel ? check_configuration(kernel, grid, block, shared_bytes) : cudaErrorInvalidResourceHandle;
  if (!error) error = check_stream(stream);
  stand_in_record(
      call, error, stream, shared_bytes, "%s grid %u,%u,%u block %u,%u,%u", kernel ? kernel->name : "unknown", grid.x,
      grid.y, grid.z, block.x, block.y, block.z
  );
  return finish(error);
}

cudaError_t cudaLaunchKernel(
    const void *stub, dim3 grid, dim3 block, void **arguments, size_t shared_bytes, cudaStream_t stream
) {
  (void)arguments;
  return launch("cudaLaunchKernel", stub, grid, block, shared_bytes, stream);
}

cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes, cudaStream_t stream
) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

cudaError_t cudaLaunchCooperativeKernel(
    const void *stub, dim3 grid, dim3 block, void **arguments, size_t shared_bytes, cudaStream_t stream
) {
  (void)arguments;
  return launch("cudaLaunchCooperativeKernel", stub, grid, block, shared_bytes, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *stub, void **arguments) {
  (void)arguments;
  return launch(
      "cudaLaunchKernelExC", stub, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream
  );
}

/* What a kernel may be asked and told. */
cudaError_t cudaFuncSetAttribute(const void *stub, enum cudaFuncAttribute attribute, int value) {
  begin();
  Kernel *kernel = find_kernel(stub);
  cudaError_t error = kernel ? cudaSuccess : cudaErrorInvalidResourceHandle;
  if (kernel && attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > MAX_SHARED_BYTES) error = cudaErrorInvalidValue;
    if (!error && (size_t)value > kernel->shared_bytes) kernel->shared_bytes = value;
  }
  return error ? recorded("cudaFuncSetAttribute", error, NO_STREAM, value, "") : finish(error);
}

cudaError_t cudaKernelSetAttributeForDevice(
    cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value, int device
) {
  (void)device;
  return cudaFuncSetAttribute(kernel, attribute, value);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *stub) {
  (void)stub;
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = MAX_THREADS;
  attributes->numRegs = 64;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = MAX_SHARED_BYTES;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *num_blocks, const void *stub, int block_size, size_t shared_bytes, unsigned flags
) {
  (void)stub, (void)block_size, (void)shared_bytes, (void)flags;
  *num_blocks = 2;
  return cudaSuccess;
}
