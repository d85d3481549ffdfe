// Weights as products read them, made from an operator's constants.
#pragma once

#include "products.h"

#define ALIGNMENT 64

enum { X, CODES, SCALES, ZEROS, ORDER, BIAS, INPUT_COUNT };  // ZEROS: codes of zero, or offsets

// Weights in their packed form, which all nodes that read equal ones share. What tells them apart is their content: the addresses
// of a session's constants may be another's before its kernels are gone.
typedef struct Packed {
  Weights weights;
  uint64_t content[2];            // a hash of the constants
  const void *from[INPUT_COUNT];  // their data; valid while they are packed
  size_t users;
  void *memory;
  struct Packed *next;
} Packed;

static inline size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// Continue a hash with a constant's bytes, or with nothing but a number of them.
void mix_in(uint64_t content[2], const void *data, size_t bytes);

// The packed form of the constants that `wanted` names, made where nobody has it yet; NULL where memory is short.
Packed *take_packed(const Packed *wanted);

// Packed weights that a node no longer reads.
void give_back(void *packed);

// How many weights are packed, of all sessions.
size_t packed_count(void);
