// The part of ONNX Runtime's C interface that is used here. Its table of functions only ever grows at its end, so that the
// places below, those of version 17, hold in every later version.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define ABI_VERSION 17

typedef struct Status Status;  // NULL where nothing went wrong
typedef struct Value Value;
typedef struct Shape Shape;
typedef struct Attribute Attribute;
typedef struct KernelInfo KernelInfo;
typedef struct KernelContext KernelContext;
typedef struct ShapeContext ShapeContext;
typedef struct SessionOptions SessionOptions;
typedef struct Domain Domain;
typedef const void *const *Functions;

typedef struct {
  Functions (*functions)(uint32_t version);  // NULL: the library is older
  const char *(*version)(void);
} ApiBase;

enum { FLOAT = 1, UINT8 = 2, INT32 = 6 };  // types of elements
enum { REQUIRED = 0, OPTIONAL = 1 };       // inputs
enum { ATTRIBUTE_INT = 1 };
enum { FAIL = 1, NOT_IMPLEMENTED = 9 };  // codes of errors

typedef struct Operator {
  uint32_t version;
  void *(*create_unchecked)(const struct Operator *, Functions, const KernelInfo *);
  const char *(*name)(const struct Operator *);
  const char *(*provider)(const struct Operator *);  // NULL: the CPU's
  int (*input_type)(const struct Operator *, size_t);
  size_t (*input_count)(const struct Operator *);
  int (*output_type)(const struct Operator *, size_t);
  size_t (*output_count)(const struct Operator *);
  void (*compute_unchecked)(void *, KernelContext *);
  void (*destroy)(void *);
  int (*input_kind)(const struct Operator *, size_t);
  int (*output_kind)(const struct Operator *, size_t);
  int (*input_memory)(const struct Operator *, size_t);
  int (*least_variadic_inputs)(const struct Operator *);
  int (*equal_variadic_inputs)(const struct Operator *);
  int (*least_variadic_outputs)(const struct Operator *);
  int (*equal_variadic_outputs)(const struct Operator *);
  Status *(*create)(const struct Operator *, Functions, const KernelInfo *, void **kernel);
  Status *(*compute)(void *, KernelContext *);
  Status *(*infer_shapes)(const struct Operator *, ShapeContext *);
  int (*first_version)(const struct Operator *);
  int (*last_version)(const struct Operator *);
} Operator;

#define CREATE_STATUS(api) ((Status * (*)(int, const char *))(api)[0])
#define CREATE_DOMAIN(api) ((Status * (*)(const char *, Domain **))(api)[26])
#define ADD_TO_DOMAIN(api) ((Status * (*)(Domain *, const Operator *))(api)[27])
#define ADD_DOMAIN(api) ((Status * (*)(SessionOptions *, Domain *))(api)[28])
#define TENSOR_DATA(api) ((Status * (*)(const Value *, void **))(api)[51])
#define CREATE_SHAPE(api) ((Status * (*)(Shape **))(api)[57])
#define SET_TYPE(api) ((Status * (*)(Shape *, int))(api)[58])
#define SET_DIMS(api) ((Status * (*)(Shape *, const int64_t *, size_t))(api)[59])
#define RANK(api) ((Status * (*)(const Shape *, size_t *))(api)[61])
#define DIMS(api) ((Status * (*)(const Shape *, int64_t *, size_t))(api)[62])
#define SYMBOLS(api) ((Status * (*)(const Shape *, const char **, size_t))(api)[63])
#define ELEMENT_COUNT(api) ((Status * (*)(const Shape *, size_t *))(api)[64])
#define TENSOR_SHAPE(api) ((Status * (*)(const Value *, Shape **))(api)[65])
#define INT_ATTRIBUTE(api) ((Status * (*)(const KernelInfo *, const char *, int64_t *))(api)[86])
#define INPUT(api) ((Status * (*)(const KernelContext *, size_t, const Value **))(api)[90])
#define OUTPUT(api) ((Status * (*)(KernelContext *, size_t, const int64_t *, size_t, Value **))(api)[91])
#define RELEASE_STATUS(api) ((void (*)(Status *))(api)[93])
#define RELEASE_SHAPE(api) ((void (*)(Shape *))(api)[99])
#define NODE_INPUTS(api) ((Status * (*)(const KernelInfo *, size_t *))(api)[230])
#define NODE_INPUT_NAME(api) ((Status * (*)(const KernelInfo *, size_t, char *, size_t *))(api)[232])
#define CONSTANT_INPUT(api) ((Status * (*)(const KernelInfo *, size_t, int *, const Value **))(api)[249])
#define INPUT_SHAPE(api) ((Status * (*)(const ShapeContext *, size_t, Shape **))(api)[268])
#define ATTRIBUTE(api) ((Status * (*)(const ShapeContext *, const char *, const Attribute **))(api)[269])
#define SET_OUTPUT_SHAPE(api) ((Status * (*)(ShapeContext *, size_t, const Shape *))(api)[270])
#define SET_SYMBOLS(api) ((Status * (*)(Shape *, const char **, size_t))(api)[271])
#define READ_ATTRIBUTE(api) ((Status * (*)(const Attribute *, int, void *, size_t, size_t *))(api)[272])
#define PARALLEL_FOR(api) ((Status * (*)(const KernelContext *, void (*)(void *, size_t), size_t, size_t, void *))(api)[274])
