// Products of float inputs, rounded to int8 in blocks, with weights of 4 or 8 bits: y[rows, outputs] = x[rows, inputs] W^T.
//
// Weights are packed for it, 16 outputs at a time ("group"): of each in turn 4 bytes of codes, then the next 4 of each. So a
// register holds one sum for each output, and what the instructions cost beside the sums themselves is the same for one row and
// for many. All sums over a block are whole numbers; blocks are added in their order. So a row's numbers depend on no other row,
// and are the same bits with every instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define GROUP 16  // outputs

typedef struct {
  size_t inputs, outputs, block, blocks;  // blocks: of each output
  int bits;                               // of a code, 4 or 8; code and weight are zero at 8 or 128, unless offsets say more
  int half;                               // whether scales are in half precision
  int exact_sums;                         // offsets are times the sums of the inputs as they came, not as they were rounded
  const uint8_t *codes;                   // [groups, inputs * bits / 32, GROUP, 4]; in a byte of two codes the lower is first
  const void *scales;                     // [groups, blocks, GROUP]
  const float *offsets;                   // [groups, blocks, GROUP], added to each weight; or NULL
  const float *bias;                      // [groups, GROUP], or NULL
} Weights;

typedef struct {
  size_t rows;
  int8_t *codes;    // [rows, inputs]; with 4 bits those of each 8 inputs in the order 0 2 4 6 1 3 5 7, as bytes unpack
  float *scales;    // [rows, blocks]
  float *sums;      // [rows, blocks]: of the inputs
  int32_t *starts;  // [rows, blocks]: minus the sum of the codes times the code of zero
} Inputs;

// Round one row of x.
typedef void Round(const float *x, const Weights *weights, Inputs *inputs, size_t row);
// Write the outputs of some groups, of all rows.
typedef void Multiply(const Weights *weights, const Inputs *inputs, float *y, size_t first_group, size_t end_group);

Round round_avx2, round_avx512;
Multiply multiply_avx2, multiply_avx512;
