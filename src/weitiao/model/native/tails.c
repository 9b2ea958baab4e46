/* Answers in the making: each row of a batch has keys and values of its own and asks with one token. compiled.py builds this file, tails.py calls it.
 *
 * Keys and values are read once for all heads that share them, in the type in which they lie there, and not beyond a row's own end.
 */

#include "vectors.h"

#define KEYS 64 /* of which scores are there at once */
#define QUERIES 4 /* heads of a key head that are computed together */
#define CHUNK 4 /* vectors of values whose sums are in registers */

/* The sum of each of 16 vectors, in their order. */
static inline vec sums_of(const vec *x) {
    __m512 pairs[8], fours[4], eights[2];
    for (int i = 0; i < 8; i++) {
        __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
        pairs[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 4; i++) {
        __m512d a = (__m512d)pairs[2 * i], b = (__m512d)pairs[2 * i + 1];
        fours[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    }
    for (int i = 0; i < 2; i++)
        eights[i] = _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd);
    return (vec)(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88) + _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

static inline float largest_of(vec x) { return _mm512_reduce_max_ps((__m512)x); }

/* query [count][width], by the scale in powers of 2; keys and values [..][width]; out [count][width] are means over the keys from..to-1. */
static inline __attribute__((always_inline)) void of_some_heads(
    const float *query, int count, const void *keys, const void *values, long from, long to, long width, float *out, float *lse, int halves) {
    float scores[QUERIES][KEYS] __attribute__((aligned(64))), top[QUERIES], total[QUERIES];
    vec sums[QUERIES][LANES];
    for (int c = 0; c < count; c++) top[c] = -1e30f, total[c] = 0;
    memset(out, 0, count * width * sizeof(float));
    for (long k0 = from; k0 < to; k0 += KEYS) {
        int there = to - k0 < KEYS ? to - k0 : KEYS;
        for (int k = 0; k < there; k += LANES) {
            for (int i = 0; i < LANES; i++) {
                vec sum[QUERIES] = {};
                for (long d = 0; k + i < there && d < width; d += LANES) {
                    vec key = get(keys, (k0 + k + i) * width + d, halves);
                    for (int c = 0; c < count; c++) sum[c] += *(const vec *)(query + c * width + d) * key;
                }
                for (int c = 0; c < count; c++) sums[c][i] = sum[c];
            }
            for (int c = 0; c < count; c++) *(vec *)(scores[c] + k) = choose(ORDER + k < there, sums_of(sums[c]), all(-1e30f));
        }
        for (int c = 0; c < count; c++) {
            vec most = all(top[c]), sum = {};
            for (int k = 0; k < there; k += LANES) most = larger(*(vec *)(scores[c] + k), most);
            float highest = largest_of(most);
            vec shrink = exp2_of(all(top[c] - highest));
            for (int k = 0; k < there; k += LANES) {
                vec p = only(ORDER + k < there, exp2_of(*(vec *)(scores[c] + k) - highest));
                *(vec *)(scores[c] + k) = p;
                sum += p;
            }
            total[c] = total[c] * shrink[0] + sum_of(sum);
            top[c] = highest;
            for (long d = 0; d < width; d += LANES) *(vec *)(out + c * width + d) *= shrink;
        }
        for (long d0 = 0; d0 < width; d0 += CHUNK * LANES) {
            int vectors = (width - d0) / LANES < CHUNK ? (width - d0) / LANES : CHUNK;
            vec sum[QUERIES][CHUNK];
            for (int c = 0; c < count; c++)
                for (int v = 0; v < CHUNK; v++) sum[c][v] = v < vectors ? *(vec *)(out + c * width + d0 + v * LANES) : (vec){};
            for (int k = 0; k < there; k++)
                for (int v = 0; v < CHUNK; v++) {
                    if (v == vectors) break;
                    vec value = get(values, (k0 + k) * width + d0 + v * LANES, halves);
                    for (int c = 0; c < count; c++) sum[c][v] += all(scores[c][k]) * value;
                }
            for (int c = 0; c < count; c++)
                for (int v = 0; v < vectors; v++) *(vec *)(out + c * width + d0 + v * LANES) = sum[c][v];
        }
    }
    for (int c = 0; c < count; c++) {
        float each = 1.0f / total[c];
        for (long d = 0; d < width; d += LANES) *(vec *)(out + c * width + d) *= each;
        lse[c] = (top[c] + log2f(total[c])) / LOG2E;
    }
}

static void of_heads(const float *query, int count, const void *keys, const void *values, long from, long to, long width, float *out, float *lse, int halves) {
    if (count == 4) of_some_heads(query, 4, keys, values, from, to, width, out, lse, halves);
    else if (count == 3) of_some_heads(query, 3, keys, values, from, to, width, out, lse, halves);
    else if (count == 2) of_some_heads(query, 2, keys, values, from, to, width, out, lse, halves);
    else of_some_heads(query, 1, keys, values, from, to, width, out, lse, halves);
}

/* query [rows][key_heads * group][width], strides in numbers; keys, values [rows and more][key_heads][room][width]; row r attends to the places
 * first[r]..last[r], both with it. out [rows][key_heads][group][width], lse [rows][key_heads][group]. 1: no memory. */
int attend_to_tails(const void *query, long q_row, long q_head, const void *keys, const void *values, const int64_t *first, const int64_t *last,
                    float *out, float *lse, float scale, long rows, long key_heads, long group, long width, long room, long threads, int halves) {
    float factor = scale * LOG2E;
    long each = halves ? sizeof(half) : sizeof(float);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long item = 0; item < rows * key_heads; item++) {
        long row = item / key_heads, head = item % key_heads, at = item * room * width * each;
        float *scaled = aligned_alloc(64, (QUERIES * width * sizeof(float) + 63) / 64 * 64);
        if (!scaled) {
            failed = 1;
            continue;
        }
        for (long g = 0; g < group; g += QUERIES) {
            int count = group - g < QUERIES ? group - g : QUERIES;
            for (int c = 0; c < count; c++)
                for (long d = 0; d < width; d += LANES)
                    *(vec *)(scaled + c * width + d) = get(query, row * q_row + (head * group + g + c) * q_head + d, halves) * factor;
            long to = item * group + g;
            of_heads(scaled, count, (const char *)keys + at, (const char *)values + at, first[row], last[row] + 1, width, out + to * width, lse + to, halves);
        }
        free(scaled);
    }
    return failed;
}

/* tail [slots][key_heads][room] of vectors of so many bytes: vector nodes[i] of new, or i where nodes is none, goes to place at[i] of row rows[i].
 * Strides of new in bytes. 1: there is no such one. */
int put_into_tails(void *tail, const void *new, const int64_t *nodes, const int64_t *rows, const int64_t *at, long count, long new_nodes, long slots,
                   long key_heads, long room, long bytes, long head_stride, long node_stride) {
    for (long i = 0; i < count; i++) {
        long node = nodes ? nodes[i] : i;
        if (node < 0 || node >= new_nodes || rows[i] < 0 || rows[i] >= slots || at[i] < 0 || at[i] >= room) return 1;
        for (long head = 0; head < key_heads; head++)
            memcpy((char *)tail + ((rows[i] * key_heads + head) * room + at[i]) * bytes, (const char *)new + head * head_stride + node * node_stride, bytes);
    }
    return 0;
}
