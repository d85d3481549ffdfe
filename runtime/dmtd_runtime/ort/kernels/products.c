// Compiled once for each instruction set.
#include "products.h"

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define JOINED(name, set) name##_##set
#define NAMED(name, set) JOINED(name, set)
#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512VNNI__
#define SET avx512
#define LANES 16  // outputs in a register
#define MOST_ROWS 8
typedef __m512 Floats;
typedef __m512i Ints;
#define LOAD_INTS(p) _mm512_loadu_si512(p)
#define LOAD_FLOATS(p) _mm512_loadu_ps(p)
#define LOAD_HALVES(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define STORE_FLOATS(p, v) _mm512_storeu_ps(p, v)
#define ALL_INTS(v) _mm512_set1_epi32(v)
#define ALL_FLOATS(v) _mm512_set1_ps(v)
#define TO_FLOATS(v) _mm512_cvtepi32_ps(v)
#define MULTIPLY(a, b) _mm512_mul_ps(a, b)
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#define LOWER(v) _mm512_and_si512(v, _mm512_set1_epi8(15))
#define UPPER(v) _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))
#else
#define SET avx2
#define LANES 8
#define MOST_ROWS 4
typedef __m256 Floats;
typedef __m256i Ints;
#define LOAD_INTS(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_FLOATS(p) _mm256_loadu_ps(p)
#define LOAD_HALVES(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define STORE_FLOATS(p, v) _mm256_storeu_ps(p, v)
#define ALL_INTS(v) _mm256_set1_epi32(v)
#define ALL_FLOATS(v) _mm256_set1_ps(v)
#define TO_FLOATS(v) _mm256_cvtepi32_ps(v)
#define MULTIPLY(a, b) _mm256_mul_ps(a, b)
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define LOWER(v) _mm256_and_si256(v, _mm256_set1_epi8(15))
#define UPPER(v) _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15))
#endif
#define REGISTERS (GROUP / LANES)

INLINE float largest(__m256 v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}

INLINE float total_of_floats(__m256 v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

INLINE int32_t total(__m256i v) {
  __m128i a = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}

void NAMED(round, SET)(const float *x, const Weights *weights, Inputs *inputs, size_t row) {
  const size_t block = weights->block, blocks = weights->blocks;
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const __m128i halves = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  x += row * weights->inputs;
  int8_t *codes = inputs->codes + row * weights->inputs;
  for (size_t b = 0; b < blocks; b++, x += block, codes += block) {
    __m256 most = _mm256_setzero_ps(), no_number = most, exact = most;
    for (size_t i = 0; i < block; i += 8) {
      __m256 v = _mm256_loadu_ps(x + i);
      most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v));
      exact = _mm256_add_ps(exact, v);
      no_number = _mm256_or_ps(no_number, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    float scale = _mm256_movemask_ps(no_number) ? NAN : largest(most) / 127;
    if (scale < FLT_MIN) scale = 0;  // its inverse may be no number
    const __m256 steps = _mm256_set1_ps(scale ? 1 / scale : 0);
    __m256i sum = _mm256_setzero_si256();
    for (size_t i = 0; i < block; i += 16) {
      __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), steps));
      __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), steps));
      sum = _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
      __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
      __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      if (weights->bits == 4) bytes = _mm_shuffle_epi8(bytes, halves);
      _mm_storeu_si128((__m128i *)(codes + i), bytes);
    }
    const size_t at = row * blocks + b;
    inputs->scales[at] = scale;
    inputs->sums[at] = weights->exact_sums ? total_of_floats(exact) : scale * (float)total(sum);
    inputs->starts[at] = (int32_t)(-(1u << (weights->bits - 1)) * (uint32_t)total(sum));  // of infinity it is anything
  }
}

// Add to the sums of R rows what the next `part` inputs give, and step over their codes. `x`: codes of the first of the rows.
#if LANES == 16
INLINE void add_part(const int bits, const int part, const int R, const int H, const uint8_t **codes, const int8_t *x,
                     size_t stride, Ints sums[MOST_ROWS][2]) {
  (void)H;
  for (int step = 0; step < part * bits / 32; step++, *codes += GROUP * 4) {
    const Ints both = LOAD_INTS(*codes), low = LOWER(both), high = UPPER(both);
    for (int m = 0; m < R; m++) {
      const int8_t *p = x + m * stride + step * 32 / bits;
      int32_t first, second;
      memcpy(&first, p, 4);
      if (bits == 4) {
        memcpy(&second, p + 4, 4);
        sums[m][0] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums[m][0], low, ALL_INTS(first)), high, ALL_INTS(second));
      } else {
        sums[m][0] = _mm512_dpbusd_epi32(sums[m][0], both, ALL_INTS(first));
      }
    }
  }
}
#else
// The sums of two products of 4 bits and 7 fit 8 times into 16 bits; a code of 8 bits is two of 4.
INLINE void add_part(const int bits, const int part, const int R, const int H, const uint8_t **codes, const int8_t *x,
                     size_t stride, Ints sums[MOST_ROWS][2]) {
  Ints low_sums[MOST_ROWS][2], high_sums[MOST_ROWS][2];
  for (int step = 0; step < part * bits / 32; step++, *codes += GROUP * 4) {
    Ints low[2], high[2];
    for (int h = 0; h < H; h++) {
      const Ints both = LOAD_INTS(*codes + h * LANES * 4);
      low[h] = LOWER(both), high[h] = UPPER(both);
    }
    for (int m = 0; m < R; m++) {
      const int8_t *p = x + m * stride + step * 32 / bits;
      int32_t first, second;
      memcpy(&first, p, 4);
      memcpy(&second, bits == 4 ? p + 4 : p, 4);
      const Ints of_low = ALL_INTS(first), of_high = ALL_INTS(second);
      for (int h = 0; h < H; h++) {
        Ints lower = _mm256_maddubs_epi16(low[h], of_low), upper = _mm256_maddubs_epi16(high[h], of_high);
        if (bits == 4) lower = _mm256_add_epi16(lower, upper);
        low_sums[m][h] = step ? _mm256_add_epi16(low_sums[m][h], lower) : lower;
        if (bits == 8) high_sums[m][h] = step ? _mm256_add_epi16(high_sums[m][h], upper) : upper;
      }
    }
  }
  for (int m = 0; m < R; m++)
    for (int h = 0; h < H; h++) {
      sums[m][h] = _mm256_add_epi32(sums[m][h], _mm256_madd_epi16(low_sums[m][h], _mm256_set1_epi16(1)));
      if (bits == 8) sums[m][h] = _mm256_add_epi32(sums[m][h], _mm256_madd_epi16(high_sums[m][h], _mm256_set1_epi16(16)));
    }
}
#endif

// R rows times H registers of outputs, from `output` on. `part`: 32, or the block where that is smaller.
INLINE void tile(const int bits, const int half, const int part, const int R, const int H, const Weights *weights,
                 const Inputs *inputs, float *y, size_t row, size_t output) {
  const size_t K = weights->inputs, blocks = weights->blocks, group = output / GROUP, within = output % GROUP;
  const uint8_t *codes = weights->codes + group * GROUP * (K * bits / 8) + within * 4;
  const size_t first = group * GROUP * blocks + within;
  const int8_t *x = inputs->codes + row * K;
  Floats made[MOST_ROWS][2];
  for (int m = 0; m < R; m++)
    for (int h = 0; h < H; h++) made[m][h] = weights->bias ? LOAD_FLOATS(weights->bias + output + h * LANES) : ALL_FLOATS(0);
  for (size_t b = 0; b < blocks; b++) {
    Ints sums[MOST_ROWS][2];
    for (int m = 0; m < R; m++)
      for (int h = 0; h < H; h++) sums[m][h] = ALL_INTS(inputs->starts[(row + m) * blocks + b]);
    for (size_t done = 0; done < weights->block; done += part, x += part) add_part(bits, part, R, H, &codes, x, K, sums);
    for (int h = 0; h < H; h++) {
      const size_t at = first + b * GROUP + h * LANES;
      const Floats scales = half ? LOAD_HALVES((const uint16_t *)weights->scales + at)
                                 : LOAD_FLOATS((const float *)weights->scales + at);
      for (int m = 0; m < R; m++) {
        const Floats factor = MULTIPLY(scales, ALL_FLOATS(inputs->scales[(row + m) * blocks + b]));
        made[m][h] = MULTIPLY_ADD(TO_FLOATS(sums[m][h]), factor, made[m][h]);
      }
      if (weights->offsets) {
        const Floats offsets = LOAD_FLOATS(weights->offsets + at);
        for (int m = 0; m < R; m++)
          made[m][h] = MULTIPLY_ADD(offsets, ALL_FLOATS(inputs->sums[(row + m) * blocks + b]), made[m][h]);
      }
    }
  }
  for (int m = 0; m < R; m++)
    for (int h = 0; h < H; h++) {
      const size_t at = output + h * LANES;
      float *to = y + (row + m) * weights->outputs + at;
      if (at + LANES <= weights->outputs) {
        STORE_FLOATS(to, made[m][h]);
      } else if (at < weights->outputs) {
        float kept[LANES];
        STORE_FLOATS(kept, made[m][h]);
        memcpy(to, kept, sizeof(float) * (weights->outputs - at));
      }
    }
}

#define TILES(R, H)                                                                            \
  case R:                                                                                      \
    for (size_t output = first * GROUP; output < end * GROUP; output += (H) * LANES)           \
      tile(bits, half, part, R, H, weights, inputs, y, row, output);                           \
    row += R;                                                                                  \
    break;

INLINE void groups(const int bits, const int half, const int part, const Weights *weights, const Inputs *inputs, float *y,
                   size_t first, size_t end) {
  for (size_t row = 0; row < inputs->rows;) {
    const size_t left = inputs->rows - row;
    switch (left < MOST_ROWS ? left : MOST_ROWS) {
#if LANES == 16
      TILES(8, 1)
      case 7: case 6: case 5: TILES(4, 1)
#else
      TILES(4, 1)
#endif
      TILES(3, 1)
      TILES(2, 1)
      TILES(1, REGISTERS)
    }
  }
}

void NAMED(multiply, SET)(const Weights *weights, const Inputs *inputs, float *y, size_t first, size_t end) {
#define OF(bits, half, part) groups(bits, half, part, weights, inputs, y, first, end)
#define OF_PART(bits, half) (weights->block == 16 ? OF(bits, half, 16) : OF(bits, half, 32))
#define OF_HALF(bits) (weights->half ? OF_PART(bits, 1) : OF_PART(bits, 0))
  weights->bits == 4 ? OF_HALF(4) : OF_HALF(8);
}
