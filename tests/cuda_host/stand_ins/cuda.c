/* The driver: the provider links one function of it, for kernels that describe their tiles. */
int cuTensorMapEncodeTiled(void) { return 0; }
