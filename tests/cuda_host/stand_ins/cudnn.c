/* cuDNN. It describes whatever it is asked to, computes nothing, and supports no graph of its backend interface: where the
 * provider takes cuDNN's attention, its node fails. The version is one whose attention it trusts (9.10.0 and 9.10.1 are none).
 * What computes is recorded as a call. */
#include <stdlib.h>

#include "stand_in.h"

enum { SUCCESS = 0, NOT_SUPPORTED = 3000 };

size_t cudnnGetVersion(void) { return 91900; }
const char *cudnnGetErrorString(int status) { return status ? "not supported by the stand-in" : "success"; }

void cudnnGetLastErrorString(char *words, size_t bytes) {
  if (bytes) words[0] = 0;
}

#define CREATE(name)         \
  int name(void **object) {  \
    *object = calloc(1, 64); \
    return SUCCESS;          \
  }
CREATE(cudnnCreate)
CREATE(cudnnCreateActivationDescriptor)
CREATE(cudnnCreateConvolutionDescriptor)
CREATE(cudnnCreateDropoutDescriptor)
CREATE(cudnnCreateFilterDescriptor)
CREATE(cudnnCreateLRNDescriptor)
CREATE(cudnnCreatePoolingDescriptor)
CREATE(cudnnCreateReduceTensorDescriptor)
CREATE(cudnnCreateRNNDataDescriptor)
CREATE(cudnnCreateRNNDescriptor)
CREATE(cudnnCreateTensorDescriptor)

#define DESTROY(name)      \
  int name(void *object) { \
    free(object);          \
    return SUCCESS;        \
  }
DESTROY(cudnnDestroy)
DESTROY(cudnnDestroyActivationDescriptor)
DESTROY(cudnnDestroyConvolutionDescriptor)
DESTROY(cudnnDestroyDropoutDescriptor)
DESTROY(cudnnDestroyFilterDescriptor)
DESTROY(cudnnDestroyLRNDescriptor)
DESTROY(cudnnDestroyPoolingDescriptor)
DESTROY(cudnnDestroyReduceTensorDescriptor)
DESTROY(cudnnDestroyRNNDataDescriptor)
DESTROY(cudnnDestroyRNNDescriptor)
DESTROY(cudnnDestroyTensorDescriptor)

#define ACCEPT(name) \
  int name(void) { return SUCCESS; }
ACCEPT(cudnnSetActivationDescriptor)
ACCEPT(cudnnSetConvolutionGroupCount)
ACCEPT(cudnnSetConvolutionMathType)
ACCEPT(cudnnSetConvolutionNdDescriptor)
ACCEPT(cudnnSetDropoutDescriptor)
ACCEPT(cudnnSetFilterNdDescriptor)
ACCEPT(cudnnSetLRNDescriptor)
ACCEPT(cudnnSetPoolingNdDescriptor)
ACCEPT(cudnnSetReduceTensorDescriptor)
ACCEPT(cudnnSetRNNDataDescriptor)
ACCEPT(cudnnSetRNNDescriptor_v8)
ACCEPT(cudnnSetStream)
ACCEPT(cudnnSetTensorNdDescriptor)

int cudnnGetReductionIndicesSize(void *handle, void *reduction, void *a, void *c, size_t *bytes) {
  (void)handle, (void)reduction, (void)a, (void)c;
  *bytes = 1024;
  return SUCCESS;
}

int cudnnGetReductionWorkspaceSize(void *handle, void *reduction, void *a, void *c, size_t *bytes) {
  return cudnnGetReductionIndicesSize(handle, reduction, a, c, bytes);
}

#define COMPUTE(name) \
  int name(void) { return stand_in_record(#name, SUCCESS, NO_STREAM, 0, "cuDNN"); }
COMPUTE(cudnnActivationForward)
COMPUTE(cudnnAddTensor)
COMPUTE(cudnnBatchNormalizationForwardInference)
COMPUTE(cudnnConvolutionBiasActivationForward)
COMPUTE(cudnnConvolutionForward)
COMPUTE(cudnnLRNCrossChannelForward)
COMPUTE(cudnnPoolingForward)
COMPUTE(cudnnReduceTensor)
COMPUTE(cudnnRNNForward)
COMPUTE(cudnnSoftmaxForward)

#define REFUSE(name) \
  int name(void) { return NOT_SUPPORTED; }
REFUSE(cudnnBackendCreateDescriptor)
REFUSE(cudnnBackendDestroyDescriptor)
REFUSE(cudnnBackendExecute)
REFUSE(cudnnBackendFinalize)
REFUSE(cudnnBackendGetAttribute)
REFUSE(cudnnBackendSetAttribute)
