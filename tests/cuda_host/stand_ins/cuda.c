/* The driver: the provider links one function of it, for kernels that describe their tiles; the runtime asks its version. */
int cuTensorMapEncodeTiled(void) { return 0; }

int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
