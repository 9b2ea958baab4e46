/* What a decoder layer does to each number beside its products: read once, written once. compiled.py builds this file, elementwise.py calls it.
 *
 * Numbers are float32 or, where halves is 1, bfloat16 in memory, and float32 in between: rounded once, at the end. Rows are whole
 * vectors: their width is a multiple of 16.
 */

#include "vectors.h"

static inline vec sigmoid(vec x) {
    vec size = choose(x > 0.0f, x, -x), t = exp2_of(-size * LOG2E), each = 1.0f / (1.0f + t);
    return choose(x > 0.0f, each, t * each);
}

/* out = silu(gate) up; count numbers. */
void silu_times_up(const void *gate, const void *up, void *out, long count, long threads, int halves) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < count; i += LANES) {
        vec g = get(gate, i, halves);
        put(out, i, g * sigmoid(g) * get(up, i, halves), halves);
    }
}

/* From d = the gradient of silu(gate) up: inner = silu(gate) up, d_gate, and d_up in the place of d. */
void silu_times_up_back(void *d, const void *gate, const void *up, void *inner, void *d_gate, long count, long threads, int halves) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < count; i += LANES) {
        vec g = get(gate, i, halves), u = get(up, i, halves), given = get(d, i, halves), s = sigmoid(g), active = g * s;
        put(inner, i, active * u, halves);
        put(d_gate, i, given * u * (s + active * (1.0f - s)), halves);
        put(d, i, given * active, halves);
    }
}

/* factors [rows] = 1 / sqrt(mean(x^2) + eps); out = weight round(x factor), as transformers rounds. x, out [rows][width]. */
void norm(const void *x, const void *weight, void *out, float *factors, float eps, long rows, long width, long threads, int halves) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        long at = row * width;
        vec squares = {};
        for (long i = 0; i < width; i += LANES) {
            vec v = get(x, at + i, halves);
            squares += v * v;
        }
        float factor = 1.0f / sqrtf(sum_of(squares) / width + eps);
        factors[row] = factor;
        for (long i = 0; i < width; i += LANES) {
            put(out, at + i, get(x, at + i, halves) * factor, halves);
            put(out, at + i, get(out, at + i, halves) * get(weight, i, halves), halves);
        }
    }
}

/* d_x = factor (d - n mean(d n)), n = x factor, d = weight grad. */
void norm_back(const void *grad, const void *x, const void *weight, const float *factors, void *d_x, long rows, long width, long threads, int halves) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        long at = row * width;
        float factor = factors[row];
        vec both = {};
        for (long i = 0; i < width; i += LANES) both += get(grad, at + i, halves) * get(weight, i, halves) * get(x, at + i, halves);
        float share = sum_of(both) * factor * factor / width;
        for (long i = 0; i < width; i += LANES)
            put(d_x, at + i, (get(grad, at + i, halves) * get(weight, i, halves) - get(x, at + i, halves) * share) * factor, halves);
    }
}

/* Each pair (i, i + width / 2) of a head turned by its row's angle, or back. x: strides head and row, out [rows][heads][width], cos and sin
 * [rows][width]. */
void rotate(const void *x, const void *cos, const void *sin, void *out, long head, long row, long heads, long rows, long width, long back, long threads, int halves) {
    long half_way = width / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++)
            for (long i = 0; i < half_way; i += LANES) {
                long from = h * head + r * row + i, at = r * width + i, to = (r * heads + h) * width + i;
                vec first = get(x, from, halves), second = get(x, from + half_way, halves);
                vec one = get(sin, back ? at + half_way : at, halves), other = get(sin, back ? at : at + half_way, halves);
                if (back) one = -one, other = -other;
                put(out, to, first * get(cos, at, halves) - second * one, halves);
                put(out, to + half_way, second * get(cos, at + half_way, halves) + first * other, halves);
            }
}

/* losses [rows] = weight (log sum exp - logit of the target); logits [rows][words] become their gradient, weight (softmax - 1 at the target). */
void cross_entropy(void *logits, const int64_t *targets, const float *weights, float *losses, long rows, long words, long threads, int halves) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        long at = row * words, target = at + targets[row];
        vec most = get(logits, at, halves);
        for (long i = LANES; i < words; i += LANES) most = larger(most, get(logits, at + i, halves));
        float top = most[0], said = halves ? one_of((half *)logits + target) : ((float *)logits)[target];
        for (int lane = 1; lane < LANES; lane++) top = most[lane] > top ? most[lane] : top;
        double total = 0;
        for (long begin = 0; begin < words; begin += 4096) { /* many small numbers are lost beside a large sum */
            vec sum = {};
            for (long i = begin; i < begin + 4096 && i < words; i += LANES) sum += exp2_of((get(logits, at + i, halves) - top) * LOG2E);
            total += sum_of(sum);
        }
        losses[row] = weights[row] * (log(total) + ((double)top - said));
        float share = weights[row] / total;
        for (long i = 0; i < words; i += LANES) {
            vec p = exp2_of((get(logits, at + i, halves) - top) * LOG2E) * share;
            if (target >= at + i && target < at + i + LANES) p[target - at - i] -= weights[row];
            put(logits, at + i, p, halves);
        }
    }
}
