/* Attention over a trie on a CPU: each key is seen by a range of queries, so a block of 64 keys and 64 queries is either skipped, taken
 * whole, or in parts and masked row by row. compiled.py builds this file with the machine's own compiler, cpu.py calls it.
 *
 * Scores stand transposed, [key][query]: a vector holds 16 queries, so that a softmax over keys needs no sum across a vector, and the
 * queries that see a key are a range of its row. Forward: the online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867); backward:
 * algorithm 4 of Dao et al. 2022 (arXiv:2205.14135), a block of queries at a time.
 *
 * float32 goes by vectors; bfloat16, with sums in float32, by the matrix tiles of AMX where they are, else by AVX-512's products of pairs.
 * What is added up in which order depends on the number of threads alone.
 */

#include "vectors.h"
#ifdef __AVX512BF16__
#define HALVES 1
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#endif
#endif

#define B 64 /* keys, and queries, of a block */
#define VECTORS (B / LANES)

/* [heads][rows][width], the last one dense; strides in elements. */
typedef struct {
    void *at;
    long head, row;
} Tensor;

/* first, last [keys]: key k is seen by the queries first[k] <= q < last[k]. lse, delta [heads][queries]. */
typedef struct {
    long heads, key_heads, queries, keys, width, threads;
    float scale;
    const int32_t *first, *last;
    Tensor query, key, value, out, grad, d_query, d_key, d_value;
    float *lse;
} Job;

/* Which queries each block of keys is seen by: hull by any of its keys, whole by all of them. */
typedef struct {
    int32_t from, to, whole_from, whole_to;
} Seen;

static Seen *seen_by(const Job *job) {
    long blocks = (job->keys + B - 1) / B;
    Seen *seen = malloc(blocks * sizeof(Seen));
    for (long j = 0; seen && j < blocks; j++) {
        Seen s = {INT32_MAX, 0, 0, INT32_MAX};
        for (long k = j * B; k < (j + 1) * B && k < job->keys; k++) {
            if (job->first[k] < s.from) s.from = job->first[k];
            if (job->last[k] > s.to) s.to = job->last[k];
            if (job->first[k] > s.whole_from) s.whole_from = job->first[k];
            if (job->last[k] < s.whole_to) s.whole_to = job->last[k];
        }
        if ((j + 1) * B > job->keys) s.whole_to = 0; /* the last keys of a block may be missing */
        seen[j] = s;
    }
    return seen;
}

static inline long least(long a, long b) { return a < b ? a : b; }
static inline int sees(Seen s, long q0, long q1) { return s.from < q1 && q0 < s.to; }
static inline int sees_whole(Seen s, long q0, long q1) { return s.whole_from <= q0 && q1 <= s.whole_to; }

/* Keys [key, key + keys) of a block are seen by queries [from, to) of a block alone, both in whole units but for the last keys. */
typedef struct {
    int key, keys, from, to;
} Part;

/* What has to be computed of a block of keys from k0 on and `rows` queries from q0 on: all of it, or its keys by so many at a time as there are
 * queries in a unit; neighbours that the same queries see are one part. Where `padded`, zeros follow the last key up to a unit. */
static int parts_of(const Job *job, Seen seen, long k0, long q0, int rows, int unit, int padded, Part parts[B / LANES]) {
    int there = least(B, job->keys - k0), count = 0, queries = (rows + unit - 1) / unit * unit;
    if (sees_whole(seen, q0, q0 + rows)) {
        parts[0] = (Part){0, B, 0, queries};
        return 1;
    }
    for (int k = 0; k < there; k += unit) {
        int keys = least(unit, there - k);
        long from = q0 + B, to = q0;
        for (long key = k0 + k; key < k0 + k + keys; key++) {
            if (job->first[key] < from) from = job->first[key];
            if (job->last[key] > to) to = job->last[key];
        }
        from = from > q0 ? (from - q0) / unit * unit : 0;
        to = least(queries, to - q0 + unit - 1) / unit * unit;
        if (from >= to) continue;
        if (padded) keys = unit;
        Part *before = count ? parts + count - 1 : NULL;
        if (before && before->from == from && before->to == to && before->key + before->keys == k) before->keys += keys;
        else parts[count++] = (Part){k, keys, from, to};
    }
    return count;
}

/* Heads that read the same keys and values, and are computed together: what is read of those, and what is added up for their gradients,
 * is fetched once for all of them. A team's own blocks still lie in a core's cache. */
#define TOGETHER 4
typedef struct {
    long group, first, count;
} Team;

static inline long teams_of(const Job *job) { return job->key_heads * ((job->heads / job->key_heads + TOGETHER - 1) / TOGETHER); }

static Team team_of(const Job *job, long team) {
    long heads = job->heads / job->key_heads, teams = teams_of(job) / job->key_heads, each = (heads + teams - 1) / teams;
    long first = team % teams * each;
    return (Team){team / teams, team / teams * heads + first, least(each, heads - first)};
}

/* Items (team, block of queries), team by team, in as many runs of like work as there are threads: starts [threads + 1]. A run begins at the
 * item whose middle is the first behind its share. 1: no memory. */
static int share_out(const Job *job, const Seen *seen, long *starts) {
    long blocks = (job->queries + B - 1) / B, key_blocks = (job->keys + B - 1) / B, total = 0, done = 0, thread = 1;
    long *work = malloc(blocks * sizeof(long));
    if (!work) return 1;
    for (long i = 0; i < blocks; i++) {
        long q0 = i * B, q1 = least(q0 + B, job->queries);
        work[i] = 1;
        for (long j = 0; j < key_blocks; j++) /* a block that is seen in part is about half the work */
            if (sees(seen[j], q0, q1)) work[i] += sees_whole(seen[j], q0, q1) ? 4 : 2;
        total += work[i];
    }
    total *= job->heads;
    starts[0] = 0;
    for (long item = 0; item < teams_of(job) * blocks; item++) {
        long next = work[item % blocks] * team_of(job, item / blocks).count;
        while (thread < job->threads && (2 * done + next) * job->threads >= 2 * total * thread) starts[thread++] = item;
        done += next;
    }
    while (thread <= job->threads) starts[thread++] = teams_of(job) * blocks;
    free(work);
    return 0;
}

/* Which block of keys is seen by whom, and who computes what; NULL: no memory. */
static Seen *divided(const Job *job, long *starts) {
    Seen *seen = seen_by(job);
    if (seen && share_out(job, seen, starts)) {
        free(seen);
        return NULL;
    }
    return seen;
}

/* Memory of a thread, kept for its next call. */
static float *scratch(size_t floats) {
    static __thread float *kept;
    static __thread size_t size;
    if (size < floats) {
        free(kept);
        kept = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        size = kept ? floats : 0;
    }
    return kept;
}

/* Which of 16 queries from q on see a key. */
static inline __mmask16 mask_of(const Job *job, long key, long q) {
    if (key >= job->keys) return 0;
    __m512i at = _mm512_add_epi32((__m512i)ORDER, _mm512_set1_epi32(q));
    return _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(job->first[key])), at, _mm512_set1_epi32(job->last[key]));
}

/* What a query's largest score begins with, and what stands for a key that it does not see: so far below that it weighs 0. */
#define NOTHING_YET -1e30f
#define UNSEEN -2e30f

/* One block of the online softmax: scores [B][B] become weights; top and total [B], of all keys so far, go on; shrink [B] is what the sums
 * so far are worth by the new top. Of the scores, only what is in a part is read and written. */
static void softmax_block(
    const Job *job, float *scores, const Part *parts, int count, int whole, long k0, long q0, float *top, float *total, float *shrink) {
    float factor = job->scale * LOG2E;
    for (int v = 0; v < VECTORS; v++) {
        vec before = *(vec *)(top + v * LANES), most = before, sum = {};
        for (const Part *part = parts; part < parts + count; part++) {
            if (v * LANES < part->from || part->to <= v * LANES) continue;
            for (int k = part->key; k < part->key + part->keys; k++) {
                vec *s = (vec *)(scores + k * B + v * LANES);
                *s *= factor;
                if (!whole) *s = (vec)_mm512_mask_mov_ps(_mm512_set1_ps(UNSEEN), mask_of(job, k0 + k, q0 + v * LANES), (__m512)*s);
                most = larger(*s, most);
            }
        }
        for (const Part *part = parts; part < parts + count; part++) {
            if (v * LANES < part->from || part->to <= v * LANES) continue;
            for (int k = part->key; k < part->key + part->keys; k++) {
                vec *s = (vec *)(scores + k * B + v * LANES);
                *s = exp2_of(*s - most);
                sum += *s;
            }
        }
        vec less = exp2_of(before - most);
        *(vec *)(total + v * LANES) = *(vec *)(total + v * LANES) * less + sum;
        *(vec *)(top + v * LANES) = most;
        *(vec *)(shrink + v * LANES) = less;
    }
}

/* Of the backward pass: scores become weights p, d_weights become p (d_weights - delta). lse in powers of 2. */
static void weights_block(
    const Job *job, float *scores, float *d_weights, const Part *parts, int count, int whole, long k0, long q0, const float *lse, const float *delta) {
    float factor = job->scale * LOG2E;
    for (const Part *part = parts; part < parts + count; part++)
        for (int k = part->key; k < part->key + part->keys; k++)
            for (int q = part->from; q < part->to; q += LANES) {
                vec *s = (vec *)(scores + k * B + q), *d = (vec *)(d_weights + k * B + q);
                vec p = exp2_of(*s * factor - *(vec *)(lse + q));
                vec d_score = p * (*d - *(vec *)(delta + q));
                if (!whole) {
                    __mmask16 mask = mask_of(job, k0 + k, q0 + q); /* where nothing is seen, anything may stand */
                    p = (vec)_mm512_maskz_mov_ps(mask, (__m512)p);
                    d_score = (vec)_mm512_maskz_mov_ps(mask, (__m512)d_score);
                }
                *s = p;
                *d = d_score;
            }
}

static void begin_rows(float *top, float *total) {
    for (int q = 0; q < B; q++) top[q] = NOTHING_YET, total[q] = 0;
}

/* What was added up so far, by the new top. */
static inline void rescale(float *sums, const float *shrink, int width) {
    for (int d = 0; d < width; d++)
        for (int v = 0; v < VECTORS; v++) *(vec *)(sums + d * B + v * LANES) *= *(vec *)(shrink + v * LANES);
}

/* Sums [width][B] become means; the log-sum-exp of each query is kept. */
static void end_rows(const Job *job, long head, long q0, int rows, float *sums, const float *top, const float *total) {
    for (int v = 0; v < VECTORS; v++) {
        vec each = 1.0f / *(vec *)(total + v * LANES);
        for (int d = 0; d < job->width; d++) *(vec *)(sums + d * B + v * LANES) *= each;
    }
    for (int q = 0; q < rows; q++) job->lse[head * job->queries + q0 + q] = (top[q] + log2f(total[q])) / LOG2E;
}

/* ------------------------------------------------------------------------------------------------------------------ float32 */

/* c [so many rows][so many vectors] (+)= a [rows][k] b [k][..]. Left to itself the compiler reads b again for each row: more than the processor reads
 * while it multiplies. */
static inline __attribute__((always_inline)) void tile(
    float *c, long ldc, const float *a, long a_row, long a_column, const float *b, long ldb, int rows, int vectors, int k, int add) {
    vec sum[8][4], right[4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = add ? *(vec *)(c + r * ldc + v * LANES) : (vec){};
    for (int l = 0; l < k; l++, a += a_column, b += ldb) {
        for (int v = 0; v < vectors; v++) {
            right[v] = *(vec *)(b + v * LANES);
            __asm__("" : "+v"(right[v]));
        }
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += all(a[r * a_row]) * right[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) *(vec *)(c + r * ldc + v * LANES) = sum[r][v];
}

/* The same for all rows, by tiles that keep the processor's units for sums busy. */
static inline __attribute__((always_inline)) void column(
    float *c, long ldc, const float *a, long a_row, long a_column, const float *b, long ldb, int m, int vectors, int k, int add) {
    int i = 0;
    for (; vectors < 3 && i + 8 <= m; i += 8) tile(c + i * ldc, ldc, a + i * a_row, a_row, a_column, b, ldb, 8, vectors, k, add);
    for (; i + 4 <= m; i += 4) tile(c + i * ldc, ldc, a + i * a_row, a_row, a_column, b, ldb, 4, vectors, k, add);
    for (; i < m; i++) tile(c + i * ldc, ldc, a + i * a_row, a_row, a_column, b, ldb, 1, vectors, k, add);
}

/* c [m][n] (+)= a [m][k] b [k][n]; a's strides are free, c's and b's rows dense. n: a multiple of 16. */
static void product(float *c, long ldc, const float *a, long a_row, long a_column, const float *b, long ldb, int m, int n, int k, int add) {
    for (; n >= 4 * LANES; n -= 4 * LANES, b += 4 * LANES, c += 4 * LANES) column(c, ldc, a, a_row, a_column, b, ldb, m, 4, k, add);
    if (n == 3 * LANES) column(c, ldc, a, a_row, a_column, b, ldb, m, 3, k, add);
    if (n == 2 * LANES) column(c, ldc, a, a_row, a_column, b, ldb, m, 2, k, add);
    if (n == LANES) column(c, ldc, a, a_row, a_column, b, ldb, m, 1, k, add);
}

/* 16 x 16 numbers change rows and columns. */
static inline void turn(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* to [width][B] = from [rows][width] transposed, 0 where rows end. width: a multiple of 16. */
static void transposed(float *to, const float *from, long row, int rows, int width) {
    __m512i r[16];
    for (int q = 0; q < B; q += LANES)
        for (int d = 0; d < width; d += LANES) {
            for (int i = 0; i < LANES; i++) r[i] = q + i < rows ? _mm512_loadu_si512(from + (q + i) * row + d) : _mm512_setzero_si512();
            turn(r);
            for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + (d + i) * B + q, r[i]);
        }
}

/* to [rows][width] = from [width][B] transposed. */
static void transposed_back(float *to, long row, const float *from, int rows, int width) {
    __m512i r[16];
    for (int q = 0; q < rows; q += LANES)
        for (int d = 0; d < width; d += LANES) {
            for (int i = 0; i < LANES; i++) r[i] = _mm512_loadu_si512(from + (d + i) * B + q);
            turn(r);
            for (int i = 0; i < LANES && q + i < rows; i++) _mm512_storeu_si512(to + (q + i) * row + d, r[i]);
        }
}

static inline float *of(const Tensor *t, long head, long row) { return (float *)t->at + head * t->head + row * t->row; }

static void forward_block(const Job *job, const Seen *seen, Team team, long q0, float *own) {
    int width = job->width, rows = least(B, job->queries - q0);
    long each = 2 * B * width + 3 * B; /* query, sums, top, total, shrink of a head */
    float *scores = own + team.count * each;
    for (long h = 0; h < team.count; h++) {
        float *query = own + h * each, *sums = query + B * width, *top = sums + B * width;
        transposed(query, of(&job->query, team.first + h, q0), job->query.row, rows, width);
        memset(sums, 0, B * width * sizeof(float));
        begin_rows(top, top + B);
    }
    for (long k0 = 0; k0 < job->keys; k0 += B) {
        Seen s = seen[k0 / B];
        if (!sees(s, q0, q0 + rows)) continue;
        Part parts[B / LANES];
        int whole = sees_whole(s, q0, q0 + rows), count = parts_of(job, s, k0, q0, rows, LANES, 0, parts);
        for (long h = 0; h < team.count; h++) {
            float *query = own + h * each, *sums = query + B * width, *top = sums + B * width, *shrink = top + 2 * B;
            for (Part *p = parts; p < parts + count; p++)
                product(scores + p->key * B + p->from, B, of(&job->key, team.group, k0 + p->key), job->key.row, 1, query + p->from, B,
                        p->keys, p->to - p->from, width, 0);
            softmax_block(job, scores, parts, count, whole, k0, q0, top, top + B, shrink);
            rescale(sums, shrink, width);
            for (Part *p = parts; p < parts + count; p++)
                product(sums + p->from, B, of(&job->value, team.group, k0 + p->key), 1, job->value.row, scores + p->key * B + p->from, B,
                        width, p->to - p->from, p->keys, 1);
        }
    }
    for (long h = 0; h < team.count; h++) {
        float *sums = own + h * each + B * width, *top = sums + B * width;
        end_rows(job, team.first + h, q0, rows, sums, top, top + B);
        transposed_back(of(&job->out, team.first + h, q0), job->out.row, sums, rows, width);
    }
}

/* d_key and d_value [keys][width], of the team's group, are this thread's own, without the scale in d_key. */
static void backward_block(const Job *job, const Seen *seen, Team team, long q0, float *own, float *d_key, float *d_value) {
    int width = job->width, rows = least(B, job->queries - q0);
    long each = 3 * B * width + 2 * B; /* query, grad, d_query, lse, delta of a head */
    float *scores = own + team.count * each, *d_weights = scores + B * B;
    for (long h = 0; h < team.count; h++) {
        long head = team.first + h;
        float *query = own + h * each, *grad = query + B * width, *d_query = grad + B * width, *lse = d_query + B * width, *delta = lse + B;
        transposed(query, of(&job->query, head, q0), job->query.row, rows, width);
        transposed(grad, of(&job->grad, head, q0), job->grad.row, rows, width);
        memset(d_query, 0, B * width * sizeof(float));
        for (int q = 0; q < B; q++) {
            lse[q] = q < rows ? job->lse[head * job->queries + q0 + q] * LOG2E : 0;
            vec sum = {};
            for (int d = 0; q < rows && d < width; d += LANES)
                sum += *(vec *)(of(&job->grad, head, q0 + q) + d) * *(vec *)(of(&job->out, head, q0 + q) + d);
            delta[q] = sum_of(sum);
        }
    }
    for (long k0 = 0; k0 < job->keys; k0 += B) {
        Seen s = seen[k0 / B];
        if (!sees(s, q0, q0 + rows)) continue;
        Part parts[B / LANES];
        int whole = sees_whole(s, q0, q0 + rows), count = parts_of(job, s, k0, q0, rows, LANES, 0, parts);
        for (long h = 0; h < team.count; h++) {
            long head = team.first + h;
            float *query = own + h * each, *grad = query + B * width, *d_query = grad + B * width, *lse = d_query + B * width, *delta = lse + B;
            for (Part *p = parts; p < parts + count; p++) {
                long at = p->key * B + p->from;
                int seeing = p->to - p->from;
                product(scores + at, B, of(&job->key, team.group, k0 + p->key), job->key.row, 1, query + p->from, B, p->keys, seeing, width, 0);
                product(d_weights + at, B, of(&job->value, team.group, k0 + p->key), job->value.row, 1, grad + p->from, B, p->keys, seeing, width, 0);
            }
            weights_block(job, scores, d_weights, parts, count, whole, k0, q0, lse, delta);
            for (Part *p = parts; p < parts + count; p++) {
                int seeing = least(p->to, rows) - p->from;
                const float *weights = scores + p->key * B + p->from, *d_scores = d_weights + p->key * B + p->from;
                long at = (k0 + p->key) * width;
                product(d_value + at, width, weights, B, 1, of(&job->grad, head, q0 + p->from), job->grad.row, p->keys, width, seeing, 1);
                product(d_key + at, width, d_scores, B, 1, of(&job->query, head, q0 + p->from), job->query.row, p->keys, width, seeing, 1);
                product(d_query + p->from * width, width, d_scores, 1, B, of(&job->key, team.group, k0 + p->key), job->key.row, seeing, width, p->keys, 1);
            }
        }
    }
    for (long h = 0; h < team.count; h++) {
        const float *d_query = own + h * each + 2 * B * width;
        for (int q = 0; q < rows; q++)
            for (int d = 0; d < width; d++) of(&job->d_query, team.first + h, q0 + q)[d] = d_query[q * width + d] * job->scale;
    }
}

/* ----------------------------------------------------------------------------------------------------------------- bfloat16 */

#ifdef HALVES

static inline half *half_of(const Tensor *t, long head, long row) { return (half *)t->at + head * t->head + row * t->row; }
static inline half rounded(float x) { /* to the nearest, ties to even */
    uint32_t bits = (union { float number; uint32_t bits; }){x}.bits;
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline vec eight_and_eight(const half *x) { return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((void *)x)), 16); }

/* c [m][n] (+)= a [m][k] b [k][n]; pairs of b's rows are interleaved, b [k / 2][n][2]. m, n, k: multiples of `halves_unit`. */
typedef void Product(float *c, long ldc, const half *a, long lda, const half *b, long ldb, int m, int n, int k, int add);

/* As `tile` and `column` above; two products of bfloat16 are added to each float32. */
static inline __attribute__((always_inline)) void tile_of_pairs(
    float *c, long ldc, const half *a, long lda, const half *b, long ldb, int rows, int vectors, int k, int add) {
    __m512 sum[8][4];
    __m512i right[4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = add ? _mm512_loadu_ps(c + r * ldc + v * LANES) : _mm512_setzero_ps();
    for (int l = 0; l < k; l += 2, b += ldb) {
        for (int v = 0; v < vectors; v++) {
            right[v] = _mm512_loadu_si512(b + 2 * v * LANES);
            __asm__("" : "+v"(right[v]));
        }
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, a + r * lda + l, sizeof pair);
            for (int v = 0; v < vectors; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)right[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + r * ldc + v * LANES, sum[r][v]);
}

static inline __attribute__((always_inline)) void column_of_pairs(
    float *c, long ldc, const half *a, long lda, const half *b, long ldb, int m, int vectors, int k, int add) {
    int tall = vectors > 2 ? 4 : 8;
    for (int i = 0; i < m; i += tall) tile_of_pairs(c + i * ldc, ldc, a + i * lda, lda, b, ldb, tall, vectors, k, add);
}

static void product_of_pairs(float *c, long ldc, const half *a, long lda, const half *b, long ldb, int m, int n, int k, int add) {
    for (; n >= 4 * LANES; n -= 4 * LANES, b += 8 * LANES, c += 4 * LANES) column_of_pairs(c, ldc, a, lda, b, ldb, m, 4, k, add);
    if (n == 3 * LANES) column_of_pairs(c, ldc, a, lda, b, ldb, m, 3, k, add);
    if (n == 2 * LANES) column_of_pairs(c, ldc, a, lda, b, ldb, m, 2, k, add);
    if (n == LANES) column_of_pairs(c, ldc, a, lda, b, ldb, m, 1, k, add);
}

#ifdef TILES

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed, aligned(64))) Tiles;

/* All eight tiles as 16 rows of 64 bytes. The libraries beside us have their own idea of them, which `before` keeps. */
static void take_tiles(Tiles *before) {
    Tiles ours = {.palette = 1};
    for (int t = 0; t < 8; t++) ours.row_bytes[t] = 64, ours.rows[t] = 16;
    _tile_storeconfig(before);
    _tile_loadconfig(&ours);
}

static void give_tiles_back(const Tiles *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

static void product_of_tiles(float *c, long ldc, const half *a, long lda, const half *b, long ldb, int m, int n, int k, int add) {
    __asm__ volatile("" ::: "memory"); /* the compiler does not know that tiles read what was just written */
    for (int i = 0; i < m; i += 32)
        for (int j = 0; j < n; j += 32) {
            float *c00 = c + i * ldc + j, *c10 = c00 + 16 * ldc;
            if (add) {
                _tile_loadd(0, c00, ldc * 4);
                _tile_loadd(1, c00 + 16, ldc * 4);
                _tile_loadd(2, c10, ldc * 4);
                _tile_loadd(3, c10 + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int l = 0; l < k; l += 32) {
                const half *right = b + l / 2 * ldb + 2 * j;
                _tile_loadd(4, a + i * lda + l, lda * 2);
                _tile_loadd(5, a + (i + 16) * lda + l, lda * 2);
                _tile_loadd(6, right, ldb * 2);
                _tile_loadd(7, right + 32, ldb * 2);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, c00, ldc * 4);
            _tile_stored(1, c00 + 16, ldc * 4);
            _tile_stored(2, c10, ldc * 4);
            _tile_stored(3, c10 + 16, ldc * 4);
        }
}

#endif

/* How bfloat16 is multiplied, and what m, n and k are multiples of: by pairs or, if prepare_halves() finds tiles, by two times two of them. */
static Product *halves_product = product_of_pairs;
static int halves_unit = LANES;

/* to [width / 2][B][2]: from [rows][width] transposed, its pairs side by side; 0 where rows end. width: a multiple of 32. */
static void pairs_across(half *to, const half *from, long row, int rows, int width) {
    __m512i r[16];
    for (int q = 0; q < B; q += LANES)
        for (int d = 0; d < width; d += 2 * LANES) {
            for (int i = 0; i < LANES; i++) r[i] = q + i < rows ? _mm512_loadu_si512(from + (q + i) * row + d) : _mm512_setzero_si512();
            turn(r);
            for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + (d + 2 * i) * B + 2 * q, r[i]);
        }
}

/* to [B / 2][width][2]: pairs of the rows of from [rows][width] interleaved. */
static void pairs_down(half *to, const half *from, long row, int rows, int width) {
    static const half none[1024];
    for (int q = 0; q < B; q += 2) {
        const half *upper = q < rows ? from + q * row : none, *lower = q + 1 < rows ? from + (q + 1) * row : none;
        uint32_t *pairs = (uint32_t *)(to + q * width);
        for (int d = 0; d < width; d++) pairs[d] = upper[d] | (uint32_t)lower[d] << 16;
    }
}

/* to [rows][width] = from [width][B] transposed and rounded. */
static void put_across(half *to, long row, const float *from, int rows, int width) {
    __m512i r[16];
    for (int q = 0; q < rows; q += LANES)
        for (int d = 0; d < width; d += LANES) {
            for (int i = 0; i < LANES; i++) r[i] = _mm512_loadu_si512(from + (d + i) * B + q);
            turn(r);
            for (int i = 0; i < LANES && q + i < rows; i++) _mm256_storeu_si256((void *)(to + (q + i) * row + d), (__m256i)_mm512_cvtneps_pbh((__m512)r[i]));
        }
}

/* Weights [B][B] in bfloat16, row by row. What stands outside of the parts is turned, too, and read by nobody. */
static void narrowed(half *to, const float *from) {
    for (int i = 0; i < B * B; i += 32)
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i)));
}

/* The same, pairs of rows interleaved: to [B / 2][B][2]. */
static void narrowed_pairs(half *to, const float *from) {
    static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i interleave = _mm512_loadu_si512(order);
    for (int k = 0; k < B; k += 2)
        for (int q = 0; q < B; q += LANES) {
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + (k + 1) * B + q), _mm512_loadu_ps(from + k * B + q));
            _mm512_storeu_si512(to + k * B + 2 * q, _mm512_permutexvar_epi16(interleave, both));
        }
}

/* Keys or values of a head, in rows [padded][width], and across, [width][B] for each block; zeros behind the last. Either may be NULL. */
static void lay_out(half *rows, half *across, const Tensor *from, long head, const Job *job, long padded) {
    long width = job->width;
    for (long k0 = 0; k0 < padded; k0 += B) {
        long there = job->keys - k0 < B ? job->keys - k0 : B;
        const half *block = half_of(from, head, k0);
        for (long k = 0; rows && k < B; k++) {
            if (k < there) memcpy(rows + (k0 + k) * width, block + k * from->row, width * sizeof(half));
            else memset(rows + (k0 + k) * width, 0, width * sizeof(half));
        }
        if (!across) continue;
        half pairs[B * width] __attribute__((aligned(64)));
        pairs_across(pairs, block, from->row, there, width);
        for (long d = 0; d < width; d += 2)
            for (long k = 0; k < B; k += LANES) {
                __m512i both = _mm512_loadu_si512(pairs + d * B + 2 * k);
                _mm256_storeu_si256((void *)(across + k0 * width + d * B + k), _mm512_cvtepi32_epi16(both));
                _mm256_storeu_si256((void *)(across + k0 * width + (d + 1) * B + k), _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
            }
    }
}

static void forward_block_of_halves(const Job *job, const Seen *seen, Team team, long q0, const half *key, const half *value_across, float *own) {
    int width = job->width, rows = least(B, job->queries - q0);
    long each = B * width + 3 * B + B * width / 2; /* sums, top, total, shrink, query (halves) of a head */
    float *scores = own + team.count * each;
    half *weights = (half *)(scores + B * B);
    for (long h = 0; h < team.count; h++) {
        float *sums = own + h * each, *top = sums + B * width;
        pairs_across((half *)(top + 3 * B), half_of(&job->query, team.first + h, q0), job->query.row, rows, width);
        memset(sums, 0, B * width * sizeof(float));
        begin_rows(top, top + B);
    }
    for (long k0 = 0; k0 < job->keys; k0 += B) {
        Seen s = seen[k0 / B];
        if (!sees(s, q0, q0 + rows)) continue;
        Part parts[B / LANES];
        int whole = sees_whole(s, q0, q0 + rows), count = parts_of(job, s, k0, q0, rows, halves_unit, 1, parts);
        for (long h = 0; h < team.count; h++) {
            float *sums = own + h * each, *top = sums + B * width, *shrink = top + 2 * B;
            const half *query = (half *)(shrink + B);
            for (Part *p = parts; p < parts + count; p++)
                halves_product(scores + p->key * B + p->from, B, key + (k0 + p->key) * width, width, query + 2 * p->from, 2 * B,
                               p->keys, p->to - p->from, width, 0);
            softmax_block(job, scores, parts, count, whole, k0, q0, top, top + B, shrink);
            rescale(sums, shrink, width);
            narrowed_pairs(weights, scores);
            for (Part *p = parts; p < parts + count; p++)
                halves_product(sums + p->from, B, value_across + k0 * width + p->key, B, weights + p->key * B + 2 * p->from, 2 * B,
                               width, p->to - p->from, p->keys, 1);
        }
    }
    for (long h = 0; h < team.count; h++) {
        float *sums = own + h * each, *top = sums + B * width;
        end_rows(job, team.first + h, q0, rows, sums, top, top + B);
        put_across(half_of(&job->out, team.first + h, q0), job->out.row, sums, rows, width);
    }
}

/* What a head of a team needs of its block of queries. */
typedef struct {
    float *d_query, *lse, *delta;
    half *query, *query_down, *grad, *grad_down;
} Own;

static inline long own_floats(long width) { return 3 * B * width + 2 * B; }
static inline Own own_of(float *at, long width) {
    float *lse = at + B * width;
    half *query = (half *)(lse + 2 * B);
    return (Own){at, lse, lse + B, query, query + B * width, query + 2 * B * width, query + 3 * B * width};
}

static void backward_block_of_halves(const Job *job, const Seen *seen, Team team, long q0, const half *key, const half *key_across, const half *value,
                                 float *memory, float *d_key, float *d_value) {
    int width = job->width, rows = least(B, job->queries - q0);
    float *scores = memory + team.count * own_floats(width), *d_weights = scores + B * B;
    half *weights = (half *)(d_weights + B * B), *d_scores = weights + B * B, *pairs = d_scores + B * B;
    for (long h = 0; h < team.count; h++) {
        long head = team.first + h;
        Own own = own_of(memory + h * own_floats(width), width);
        const half *q_rows = half_of(&job->query, head, q0), *g_rows = half_of(&job->grad, head, q0);
        pairs_across(own.query, q_rows, job->query.row, rows, width);
        pairs_down(own.query_down, q_rows, job->query.row, rows, width);
        pairs_across(own.grad, g_rows, job->grad.row, rows, width);
        pairs_down(own.grad_down, g_rows, job->grad.row, rows, width);
        memset(own.d_query, 0, B * width * sizeof(float));
        for (int q = 0; q < B; q++) {
            vec sum = {};
            for (int d = 0; q < rows && d < width; d += LANES)
                sum += eight_and_eight(g_rows + q * job->grad.row + d) * eight_and_eight(half_of(&job->out, head, q0 + q) + d);
            own.delta[q] = sum_of(sum);
            own.lse[q] = q < rows ? job->lse[head * job->queries + q0 + q] * LOG2E : 0;
        }
    }
    for (long k0 = 0; k0 < job->keys; k0 += B) {
        Seen s = seen[k0 / B];
        if (!sees(s, q0, q0 + rows)) continue;
        Part parts[B / LANES];
        int whole = sees_whole(s, q0, q0 + rows), count = parts_of(job, s, k0, q0, rows, halves_unit, 1, parts);
        for (long h = 0; h < team.count; h++) {
            Own own = own_of(memory + h * own_floats(width), width);
            for (Part *p = parts; p < parts + count; p++) {
                long at = p->key * B + p->from, row = (k0 + p->key) * width;
                halves_product(scores + at, B, key + row, width, own.query + 2 * p->from, 2 * B, p->keys, p->to - p->from, width, 0);
                halves_product(d_weights + at, B, value + row, width, own.grad + 2 * p->from, 2 * B, p->keys, p->to - p->from, width, 0);
            }
            weights_block(job, scores, d_weights, parts, count, whole, k0, q0, own.lse, own.delta);
            narrowed(weights, scores);
            narrowed(d_scores, d_weights);
            narrowed_pairs(pairs, d_weights);
            for (Part *p = parts; p < parts + count; p++) {
                long row = (k0 + p->key) * width, at = p->key * B + p->from, seeing = p->to - p->from;
                halves_product(d_value + row, width, weights + at, B, own.grad_down + p->from * width, 2 * width, p->keys, width, seeing, 1);
                halves_product(d_key + row, width, d_scores + at, B, own.query_down + p->from * width, 2 * width, p->keys, width, seeing, 1);
                halves_product(own.d_query + p->from, B, key_across + k0 * width + p->key, B, pairs + p->key * B + 2 * p->from, 2 * B,
                               width, seeing, p->keys, 1);
            }
        }
    }
    for (long h = 0; h < team.count; h++) {
        Own own = own_of(memory + h * own_floats(width), width);
        for (long i = 0; i < B * width; i += LANES) *(vec *)(own.d_query + i) *= job->scale;
        put_across(half_of(&job->d_query, team.first + h, q0), job->d_query.row, own.d_query, rows, width);
    }
}

#endif

/* --------------------------------------------------------------------------------------------------------------------- calls */

/* Asks Linux for tiles, which from now on compute bfloat16 where they are. Is it computed here at all? */
int prepare_halves(void) {
#ifdef TILES
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0) halves_product = product_of_tiles, halves_unit = 2 * LANES;
#endif
#ifdef HALVES
    return 1;
#else
    return 0;
#endif
}

/* out and lse from query, key and value. 0: done; 1: no memory. */
int forward(const Job *job, int halves) {
    long blocks = (job->queries + B - 1) / B, padded = (job->keys + B - 1) / B * B, starts[job->threads + 1];
    Seen *seen = divided(job, starts);
    int failed = 0;
    if (!seen) return 1;
#pragma omp parallel for num_threads(job->threads) schedule(static, 1)
    for (long thread = 0; thread < job->threads; thread++) {
        size_t laid_out = halves ? padded * job->width : 0; /* keys and values, half a float each */
        float *own = scratch(laid_out + TOGETHER * (2 * B * job->width + 3 * B) + 2 * B * B);
        if (!own) {
            failed = 1;
            continue;
        }
#ifdef HALVES
        half *key = (half *)own, *value_across = key + padded * job->width;
        long group = -1;
#endif
#ifdef TILES
        Tiles before;
        if (halves && halves_product == product_of_tiles) take_tiles(&before);
#endif
        for (long item = starts[thread]; item < starts[thread + 1]; item++) {
            Team team = team_of(job, item / blocks);
            long q0 = item % blocks * B;
#ifdef HALVES
            if (halves) {
                if (group != team.group) {
                    group = team.group;
                    lay_out(key, NULL, &job->key, group, job, padded);
                    lay_out(NULL, value_across, &job->value, group, job, padded);
                }
                forward_block_of_halves(job, seen, team, q0, key, value_across, own + laid_out);
                continue;
            }
#endif
            forward_block(job, seen, team, q0, own);
        }
#ifdef TILES
        if (halves && halves_product == product_of_tiles) give_tiles_back(&before);
#endif
    }
    free(seen);
    return failed;
}

/* d_query, d_key and d_value from all the others. sums: zeros, [threads][2][groups][padded][width]; groups: of key heads, as many as a thread
 * meets; padded: keys up to a multiple of 64. */
int backward(const Job *job, int halves, float *sums, long groups) {
    long blocks = (job->queries + B - 1) / B, padded = (job->keys + B - 1) / B * B, starts[job->threads + 1];
    long each = groups * padded * job->width;
    Seen *seen = divided(job, starts);
    int failed = 0;
    if (!seen) return 1;
#pragma omp parallel for num_threads(job->threads) schedule(static, 1)
    for (long thread = 0; thread < job->threads; thread++) {
        size_t laid_out = halves ? (padded * job->width * 3 + 1) / 2 : 0;
        float *own = scratch(laid_out + TOGETHER * (3 * B * job->width + 2 * B) + 4 * B * B), *d_key = sums + thread * 2 * each, *d_value = d_key + each;
        if (!own) {
            failed = 1;
            continue;
        }
#ifdef HALVES
        half *key = (half *)own, *key_across = key + padded * job->width, *value = key_across + padded * job->width;
        long group = -1;
#endif
#ifdef TILES
        Tiles before;
        if (halves && halves_product == product_of_tiles) take_tiles(&before);
#endif
        for (long item = starts[thread]; item < starts[thread + 1]; item++) {
            Team team = team_of(job, item / blocks);
            long q0 = item % blocks * B, met = team.group - team_of(job, starts[thread] / blocks).group, at = met * padded * job->width;
            if (met >= groups) {
                failed = 1;
                break;
            }
#ifdef HALVES
            if (halves) {
                if (group != team.group) {
                    group = team.group;
                    lay_out(key, key_across, &job->key, group, job, padded);
                    lay_out(value, NULL, &job->value, group, job, padded);
                }
                backward_block_of_halves(job, seen, team, q0, key, key_across, value, own + laid_out, d_key + at, d_value + at);
                continue;
            }
#endif
            backward_block(job, seen, team, q0, own, d_key + at, d_value + at);
        }
#ifdef TILES
        if (halves && halves_product == product_of_tiles) give_tiles_back(&before);
#endif
    }
    free(seen);
    if (failed) return 1;
#pragma omp parallel for num_threads(job->threads) schedule(static)
    for (long row = 0; row < job->key_heads * job->keys; row++) {
        long group = row / job->keys, k = row % job->keys;
        float d_key[job->width], d_value[job->width];
        memset(d_key, 0, sizeof d_key);
        memset(d_value, 0, sizeof d_value);
        for (long thread = 0; thread < job->threads; thread++) {
            if (starts[thread] == starts[thread + 1]) continue;
            long met = group - team_of(job, starts[thread] / blocks).group, last = team_of(job, (starts[thread + 1] - 1) / blocks).group;
            if (met < 0 || group > last) continue;
            const float *key = sums + thread * 2 * each + (met * padded + k) * job->width, *value = key + each;
            for (int d = 0; d < job->width; d++) d_key[d] += key[d] * job->scale, d_value[d] += value[d];
        }
        for (int d = 0; d < job->width; d++) {
#ifdef HALVES
            if (halves) {
                half_of(&job->d_key, group, k)[d] = rounded(d_key[d]), half_of(&job->d_value, group, k)[d] = rounded(d_value[d]);
                continue;
            }
#endif
            of(&job->d_key, group, k)[d] = d_key[d], of(&job->d_value, group, k)[d] = d_value[d];
        }
    }
    return 0;
}
