/* cuRAND: the provider links it and calls it for Dropout alone, which a bundle has not. */
int stand_in_curand(void) { return 0; }
