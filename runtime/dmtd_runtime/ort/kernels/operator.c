// MatMulNBits of ONNX Runtime's domain, registered over its own: what a session's graph says stays the same. MatMulNBits of ours
// has offsets in the place of zero points; it is a function of a graph's file, which is taken apart where this library is missing.
#include <cpuid.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime_abi.h"
#include "packing.h"
#include "products.h"

#define MOST_DIMS 8
#define ROUNDED_APART 8      // rows from which on threads share their rounding
#define GROUPS_AT_A_TIME 2   // that a thread takes at least
#define MOST_PARTS 64

static Functions api;
static Round *round_row;
static Multiply *multiply;

#define TRY(call)                       \
  do {                                  \
    Status *status_ = (call);           \
    if (status_ != NULL) return status_; \
  } while (0)

static atomic_uint unnamed;

static Status *refuse(int code, const char *words) { return CREATE_STATUS(api)(code, words); }

// Whether a node has an input, which may be left out in the middle by an empty name.
static Status *is_given(const KernelInfo *info, size_t input, int *given) {
  size_t count, size = 0;
  TRY(NODE_INPUTS(api)(info, &count));
  *given = input < count;
  if (*given) TRY(NODE_INPUT_NAME(api)(info, input, NULL, &size));
  *given = size > 1;  // with its end
  return NULL;
}

// The data of a constant input, `count` elements of `width` bytes, and its part of what tells the weights from others; NULL where
// the node leaves it out.
static Status *constant(const KernelInfo *info, size_t input, size_t count, size_t width, Packed *wanted) {
  int given, is_constant = 0;
  const Value *value = NULL;
  TRY(is_given(info, input, &given));
  mix_in(wanted->content, NULL, given);
  if (!given) return input < ZEROS ? refuse(FAIL, "MatMulNBits: an input is missing") : NULL;
  Status *status = CONSTANT_INPUT(api)(info, input, &is_constant, &value);
  if (status != NULL) RELEASE_STATUS(api)(status);
  if (status != NULL || !is_constant || value == NULL) {
    return refuse(NOT_IMPLEMENTED, "MatMulNBits: weights, zero points, offsets or a bias that are no constants");
  }
  Shape *shape;
  size_t found;
  TRY(TENSOR_SHAPE(api)(value, &shape));
  status = ELEMENT_COUNT(api)(shape, &found);
  RELEASE_SHAPE(api)(shape);
  TRY(status);
  if (found != count) return refuse(FAIL, "MatMulNBits: a constant has not the size that N, K, bits and block_size give");
  TRY(TENSOR_DATA(api)(value, (void **)&wanted->from[input]));
  mix_in(wanted->content, wanted->from[input], count * width);
  return NULL;
}

// 0 where there is none: what the operator takes it for, or nothing that this kernel knows.
static int64_t attribute(const KernelInfo *info, const char *name_) {
  int64_t value = 0;
  Status *status = INT_ATTRIBUTE(api)(info, name_, &value);
  if (status != NULL) RELEASE_STATUS(api)(status);
  return status != NULL ? 0 : value;
}

static const Operator ours;

static Status *create(const Operator *op, Functions functions, const KernelInfo *info, void **kernel) {
  (void)functions;
  const int64_t outputs = attribute(info, "N"), inputs = attribute(info, "K");
  const int64_t bits = attribute(info, "bits"), block = attribute(info, "block_size");
  int ordered;
  TRY(is_given(info, ORDER, &ordered));
  if (attribute(info, "accuracy_level") != 4) return refuse(NOT_IMPLEMENTED, "MatMulNBits: an accuracy_level that is not 4");
  if (ordered) return refuse(NOT_IMPLEMENTED, "MatMulNBits: an order of its inputs");
  const int known = (bits == 4 || bits == 8) && block >= 16 && block <= 256 && (block & (block - 1)) == 0;
  if (!known || inputs < block || inputs % block || outputs < 1) {
    return refuse(NOT_IMPLEMENTED, "MatMulNBits: bits, block_size, N or K that this kernel does not know");
  }
  const size_t blocks = inputs / block;
  const int offsets = op == &ours;
  Packed wanted = {
      .weights = {.inputs = inputs, .outputs = outputs, .block = block, .blocks = blocks, .bits = bits, .exact_sums = offsets}};
  TRY(constant(info, CODES, outputs * inputs * bits / 8, 1, &wanted));
  TRY(constant(info, SCALES, outputs * blocks, 4, &wanted));
  if (offsets) {
    TRY(constant(info, ZEROS, outputs * blocks, 4, &wanted));
  } else {
    TRY(constant(info, ZEROS, outputs * (bits == 8 ? blocks : (blocks + 1) / 2), 1, &wanted));
  }
  TRY(constant(info, BIAS, outputs, 4, &wanted));
  if (offsets && wanted.from[ZEROS] == NULL) return refuse(FAIL, "MatMulNBits: an input is missing");
  *kernel = take_packed(&wanted);
  return *kernel == NULL ? refuse(FAIL, "bad allocation: MatMulNBits packs its weights") : NULL;
}

typedef struct {
  const Weights *weights;
  const float *x;
  float *y;
  Inputs inputs;
  size_t groups_at_a_time;
} Job;

static void round_one(void *job_, size_t row) {
  Job *job = job_;
  round_row(job->x, job->weights, &job->inputs, row);
}

static void multiply_some(void *job_, size_t part) {
  Job *job = job_;
  const size_t groups = (job->weights->outputs + GROUP - 1) / GROUP, first = part * job->groups_at_a_time;
  const size_t end = first + job->groups_at_a_time;
  multiply(job->weights, &job->inputs, job->y, first, end < groups ? end : groups);
}

static Status *dims_of(const Value *value, int64_t *dims, size_t *rank) {
  Shape *shape;
  TRY(TENSOR_SHAPE(api)(value, &shape));
  Status *status = RANK(api)(shape, rank);
  if (status == NULL && (*rank < 1 || *rank > MOST_DIMS)) status = refuse(FAIL, "MatMulNBits: inputs of 0 or too many dimensions");
  if (status == NULL) status = DIMS(api)(shape, dims, *rank);
  RELEASE_SHAPE(api)(shape);
  return status;
}

static Status *compute(void *kernel, KernelContext *context) {
  const Weights *w = &((Packed *)kernel)->weights;
  Job job = {.weights = w};
  const Value *input;
  Value *output;
  int64_t dims[MOST_DIMS];
  size_t rank, rows = 1;
  TRY(INPUT(api)(context, X, &input));
  TRY(dims_of(input, dims, &rank));
  TRY(TENSOR_DATA(api)(input, (void **)&job.x));
  if (dims[rank - 1] != (int64_t)w->inputs) return refuse(FAIL, "MatMulNBits: inputs are not K wide");
  for (size_t i = 0; i + 1 < rank; i++) rows *= dims[i];
  dims[rank - 1] = w->outputs;
  TRY(OUTPUT(api)(context, 0, dims, rank, &output));
  TRY(TENSOR_DATA(api)(output, (void **)&job.y));
  if (rows == 0) return NULL;

  const size_t code_bytes = aligned(rows * w->inputs), count = rows * w->blocks;
  int8_t *scratch = aligned_alloc(ALIGNMENT, code_bytes + aligned(3 * 4 * count));
  if (scratch == NULL) return refuse(FAIL, "bad allocation: MatMulNBits rounds its inputs");
  float *scales = (float *)(scratch + code_bytes);
  job.inputs = (Inputs){
      .rows = rows, .codes = scratch, .scales = scales, .sums = scales + count, .starts = (int32_t *)(scales + 2 * count)};
  const size_t groups = (w->outputs + GROUP - 1) / GROUP;
  job.groups_at_a_time = groups / MOST_PARTS > GROUPS_AT_A_TIME ? groups / MOST_PARTS : GROUPS_AT_A_TIME;
  Status *status = NULL;
  if (rows >= ROUNDED_APART) {
    status = PARALLEL_FOR(api)(context, round_one, rows, 0, &job);
  } else {
    for (size_t row = 0; row < rows; row++) round_one(&job, row);
  }
  if (status == NULL) {
    status = PARALLEL_FOR(api)(context, multiply_some, (groups + job.groups_at_a_time - 1) / job.groups_at_a_time, 0, &job);
  }
  free(scratch);
  return status;
}

// Outputs have the dimensions of the inputs but for the last, which is N. A dimension that is not known needs a name: without one
// ONNX Runtime takes its -1 for its size. The names that are made up here are those of no other tensor.
static Status *infer_shapes(const Operator *op, ShapeContext *context) {
  (void)op;
  Shape *input, *output;
  const Attribute *attribute;
  int64_t dims[MOST_DIMS], outputs;
  const char *symbols[MOST_DIMS];
  char made[MOST_DIMS][32];
  size_t rank, read;
  TRY(INPUT_SHAPE(api)(context, X, &input));
  TRY(RANK(api)(input, &rank));
  if (rank < 1 || rank > MOST_DIMS) return NULL;
  for (size_t i = 0; i < rank; i++) symbols[i] = "";  // only names that there are get written
  TRY(DIMS(api)(input, dims, rank));
  TRY(SYMBOLS(api)(input, symbols, rank));
  for (size_t i = 0; i < rank; i++) {
    if (dims[i] >= 0 || symbols[i][0] != 0) continue;
    snprintf(made[i], sizeof made[i], "MatMulNBits_rows_%u", atomic_fetch_add(&unnamed, 1));
    symbols[i] = made[i];
  }
  TRY(ATTRIBUTE(api)(context, "N", &attribute));
  TRY(READ_ATTRIBUTE(api)(attribute, ATTRIBUTE_INT, &outputs, sizeof outputs, &read));
  dims[rank - 1] = outputs;
  symbols[rank - 1] = "";
  TRY(CREATE_SHAPE(api)(&output));
  Status *status = SET_TYPE(api)(output, FLOAT);
  if (status == NULL) status = SET_DIMS(api)(output, dims, rank);
  if (status == NULL) status = SET_SYMBOLS(api)(output, symbols, rank);
  if (status == NULL) status = SET_OUTPUT_SHAPE(api)(context, 0, output);
  RELEASE_SHAPE(api)(output);
  return status;
}

static const char *name(const Operator *op) { return (void)op, "MatMulNBits"; }
static const char *provider(const Operator *op) { return (void)op, NULL; }
static int input_type(const Operator *op, size_t input) {
  static const int types[INPUT_COUNT] = {FLOAT, UINT8, FLOAT, UINT8, INT32, FLOAT};
  return input == ZEROS && op == &ours ? FLOAT : types[input];
}
static size_t input_count(const Operator *op) { return (void)op, INPUT_COUNT; }
static int input_kind(const Operator *op, size_t input) { return (void)op, input < ZEROS ? REQUIRED : OPTIONAL; }
static int output_type(const Operator *op, size_t output) { return (void)op, (void)output, FLOAT; }
static size_t output_count(const Operator *op) { return (void)op, 1; }
static int output_kind(const Operator *op, size_t output) { return (void)op, (void)output, REQUIRED; }
static int in_memory(const Operator *op, size_t input) { return (void)op, (void)input, 0; }
static int one(const Operator *op) { return (void)op, 1; }
static int any_version(const Operator *op) { return (void)op, INT32_MAX; }

#define OPERATOR                             \
  {                                          \
      .version = ABI_VERSION,                \
      .name = name,                          \
      .provider = provider,                  \
      .input_type = input_type,              \
      .input_count = input_count,            \
      .output_type = output_type,            \
      .output_count = output_count,          \
      .destroy = give_back,                  \
      .input_kind = input_kind,              \
      .output_kind = output_kind,            \
      .input_memory = in_memory,             \
      .least_variadic_inputs = one,          \
      .equal_variadic_inputs = one,          \
      .least_variadic_outputs = one,         \
      .equal_variadic_outputs = one,         \
      .create = create,                      \
      .compute = compute,                    \
      .infer_shapes = infer_shapes,          \
      .first_version = one,                  \
      .last_version = any_version,           \
  }

static const Operator onnxruntimes = OPERATOR, ours = OPERATOR;


#define BIT(value, place) (((value) >> (place)) & 1)

// The best instruction set that processor and operating system have: 2 AVX-512 with VNNI, 1 AVX2, 0 none that is used here.
static int best_set(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !BIT(c, 12) || !BIT(c, 27) || !BIT(c, 29)) return 0;  // FMA, XGETBV, F16C
  uint32_t saved, upper;
  __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  if ((saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !BIT(b, 5)) return 0;
  const int avx512 = BIT(b, 16) && BIT(b, 17) && BIT(b, 30) && BIT(b, 31) && BIT(c, 11);  // F, DQ, BW, VL, VNNI
  return avx512 && (saved & 0xe6) == 0xe6 ? 2 : 1;
}

#define EXPORTED __attribute__((visibility("default")))

EXPORTED size_t dmtd_kernels_packed(void) { return packed_count(); }

// The instruction set that products will use, "" where there is none; `most` bounds it by the names given here.
EXPORTED const char *dmtd_kernels_choose(const char *most) {
  int set = best_set();
  if (set == 2 && most != NULL && strcmp(most, "avx2") == 0) set = 1;
  round_row = set == 2 ? round_avx512 : round_avx2;
  multiply = set == 2 ? multiply_avx512 : multiply_avx2;
  return set == 2 ? "avx512" : set == 1 ? "avx2" : "";
}

EXPORTED Status *RegisterCustomOps(SessionOptions *options, const ApiBase *base) {
  static Domain *domains[2];
  static const char *const names[] = {"com.microsoft", "dmtd"};
  static const Operator *const operators[] = {&onnxruntimes, &ours};
  api = base->functions(ABI_VERSION);
  if (round_row == NULL) dmtd_kernels_choose(NULL);
  for (int i = 0; i < 2; i++) {
    if (domains[i] == NULL) {
      Domain *domain;
      TRY(CREATE_DOMAIN(api)(names[i], &domain));
      TRY(ADD_TO_DOMAIN(api)(domain, operators[i]));
      domains[i] = domain;
    }
    TRY(ADD_DOMAIN(api)(options, domains[i]));
  }
  return NULL;
}
