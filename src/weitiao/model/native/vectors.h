/* 16 numbers at a time, by AVX-512. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifndef __AVX512F__
#error Neither processor nor compiler may lack AVX-512: on narrower vectors the kernels of PyTorch are several times as quick.
#endif
#include <immintrin.h>

#define LANES 16
#define LOG2E 1.4426950408889634f

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t half; /* the bits of a bfloat16 */

static const ints ORDER = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline vec all(float x) { return x - (vec){}; }
static inline vec only(ints mask, vec x) { return (vec)((ints)x & mask); }
static inline vec choose(ints mask, vec a, vec b) { return (vec)(((ints)a & mask) | ((ints)b & ~mask)); }

static inline vec larger(vec a, vec b) {
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
}

static inline float sum_of(vec x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* 2^x for x <= 0, to 2e-7 of it; what it makes of a larger x is masked by those who ask. The nearest integer goes into the exponent, a
 * Taylor polynomial takes the rest, |r| <= 1/2. Below 2^-64 it is 0: nothing is lost beside a 1, and no product of two such numbers is so
 * small that the processor slows down. What is no number stays none. */
static inline vec exp2_of(vec x) {
    vec whole = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - whole;
    vec p = all(1.5403530e-4f);
    p = p * r + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    return (vec)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-64.0f), _CMP_NLE_UQ), (__m512)p, (__m512)whole);
}

/* Memory holds float32 or, where halves is 1, bfloat16. */
typedef uint16_t sixteen_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec get(const void *from, long i, int halves) {
    if (!halves) return *(const vec *)((const float *)from + i);
    return (vec)(__builtin_convertvector(*(const sixteen_halves *)((const half *)from + i), bits) << 16);
}

static inline float one_of(const half *x) { return (union { uint32_t bits; float number; }){(uint32_t)*x << 16}.number; }

/* Rounded to the nearest, ties to even; what is no number stays none. */
static inline void put(void *to, long i, vec x, int halves) {
    if (!halves) {
        *(vec *)((float *)to + i) = x;
        return;
    }
    bits number = (bits)x, none = (bits)(x != x) & 0x7fc0, up = (number + 0x7fff + (number >> 16 & 1)) >> 16;
    *(sixteen_halves *)((half *)to + i) = __builtin_convertvector(none | (up & (bits)(x == x)), sixteen_halves);
}
