#include "packing.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static Packed *all_packed;
static pthread_mutex_t packing = PTHREAD_MUTEX_INITIALIZER;

static uint16_t to_half(float value, int *exact) {
  const _Float16 half = (_Float16)value;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  *exact &= (float)half == value;
  return bits;
}

static int pack(Packed *packed) {
  Weights *w = &packed->weights;
  const size_t groups = (w->outputs + GROUP - 1) / GROUP, row = w->inputs * w->bits / 8, per_group = w->blocks * GROUP;
  const uint8_t *codes = packed->from[CODES], *zeros = w->exact_sums ? NULL : packed->from[ZEROS];
  const float *offsets = w->exact_sums ? packed->from[ZEROS] : NULL, *scales = packed->from[SCALES], *bias = packed->from[BIAS];
  const size_t scale_count = w->outputs * w->blocks;
  w->half = 1;
  for (size_t i = 0; i < scale_count && w->half; i++) to_half(scales[i], &w->half);

  const size_t sizes[] = {
      aligned(groups * GROUP * row),
      aligned(groups * per_group * (w->half ? 2 : 4)),
      zeros || offsets ? aligned(groups * per_group * 4) : 0,
      bias ? aligned(groups * GROUP * 4) : 0,
  };
  uint8_t *memory = aligned_alloc(ALIGNMENT, sizes[0] + sizes[1] + sizes[2] + sizes[3]);
  if (memory == NULL) return 0;
  packed->memory = memory;
  uint8_t *to_codes = memory, *to_scales = to_codes + sizes[0];
  float *to_offsets = (float *)(to_scales + sizes[1]), *to_bias = (float *)(to_scales + sizes[1] + sizes[2]);
  memset(memory, 0, sizes[0] + sizes[1] + sizes[2] + sizes[3]);  // outputs that fill the last group up
  for (size_t n = 0; n < w->outputs; n++) {
    const size_t group = n / GROUP, lane = n % GROUP;
    uint8_t *to = to_codes + group * GROUP * row + lane * 4;
    for (size_t step = 0; step < row / 4; step++) memcpy(to + step * GROUP * 4, codes + n * row + step * 4, 4);
    for (size_t b = 0; b < w->blocks; b++) {
      const size_t at = group * per_group + b * GROUP + lane;
      const float scale = scales[n * w->blocks + b];
      int exact = 1;
      if (w->half) {
        ((uint16_t *)to_scales)[at] = to_half(scale, &exact);
      } else {
        ((float *)to_scales)[at] = scale;
      }
      if (offsets) {
        to_offsets[at] = offsets[n * w->blocks + b];
      } else if (zeros) {
        const size_t zero_row = w->bits == 8 ? w->blocks : (w->blocks + 1) / 2;
        const uint8_t *zero = zeros + n * zero_row;
        const int code = w->bits == 8 ? zero[b] : (zero[b / 2] >> (b % 2 * 4)) & 15;
        to_offsets[at] = scale * (float)((1 << (w->bits - 1)) - code);
      }
    }
    if (bias) to_bias[n] = bias[n];
  }
  w->codes = to_codes;
  w->scales = to_scales;
  w->offsets = zeros || offsets ? to_offsets : NULL;
  w->bias = bias ? to_bias : NULL;
  return 1;
}

void mix_in(uint64_t content[2], const void *data, size_t bytes) {
  uint64_t one = content[0] ^ bytes, other = content[1] + bytes, word;
  const uint8_t *p = data;
  for (size_t left = data == NULL ? 0 : bytes; left; p += 8) {
    word = 0;
    memcpy(&word, p, left < 8 ? left : 8);
    left -= left < 8 ? left : 8;
    one = (one ^ word) * 0x9e3779b97f4a7c15u;
    one ^= one >> 32;
    other = (other + word) * 0xd6e8feb86659fd93u;
    other ^= other >> 29;
  }
  content[0] = one;
  content[1] = other;
}

static int same(const Packed *a, const Packed *b) {
  const Weights *v = &a->weights, *w = &b->weights;
  return v->inputs == w->inputs && v->outputs == w->outputs && v->block == w->block && v->bits == w->bits &&
         v->exact_sums == w->exact_sums && memcmp(a->content, b->content, sizeof a->content) == 0;
}

Packed *take_packed(const Packed *wanted) {
  pthread_mutex_lock(&packing);
  Packed *found = all_packed;
  while (found != NULL && !same(found, wanted)) found = found->next;
  if (found == NULL && (found = malloc(sizeof *found)) != NULL) {
    *found = *wanted;
    if (pack(found)) {
      found->next = all_packed;
      all_packed = found;
    } else {
      free(found);
      found = NULL;
    }
  }
  if (found != NULL) found->users++;
  pthread_mutex_unlock(&packing);
  return found;
}

void give_back(void *packed_) {
  Packed *packed = packed_;
  pthread_mutex_lock(&packing);
  if (--packed->users == 0) {
    Packed **place = &all_packed;
    while (*place != packed) place = &(*place)->next;
    *place = packed->next;
    free(packed->memory);
    free(packed);
  }
  pthread_mutex_unlock(&packing);
}

size_t packed_count(void) {
  size_t count = 0;
  pthread_mutex_lock(&packing);
  for (const Packed *packed = all_packed; packed != NULL; packed = packed->next) count++;
  pthread_mutex_unlock(&packing);
  return count;
}
