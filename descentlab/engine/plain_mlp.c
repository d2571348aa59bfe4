/* Steps and evaluations of many plain MLPs: gather, forward, cross-entropy, backward; equations in batched_mlp.py.
 * REAL is float or double. One member at a time, all of it in the first-level cache; samples stand last and are padded
 * with zeros to whole vectors. No allocation, no threads; a NaN stays with its member. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES ((int)(64 / sizeof(REAL)))
typedef REAL vec __attribute__((vector_size(64)));
#ifdef DOUBLE
typedef int64_t word;
#define EXP_LOW -708.0
#define EXP_HIGH 709.0
#define MAGIC 6755399441055744.0 /* 1.5 * 2^52: adding it rounds to an integer, in the low bits */
#define MANTISSA 52
#define BIAS 1023
#define LN2_HIGH 6.93147180369123816490e-01
#define LN2_LOW 1.90821492927058770002e-10
#define TERMS 13
#else
typedef int32_t word;
#define EXP_LOW -87.0f
#define EXP_HIGH 88.0f
#define MAGIC 12582912.0f
#define MANTISSA 23
#define BIAS 127
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define TERMS 7
#endif
typedef word ivec __attribute__((vector_size(64)));

static inline vec all(REAL x) { return x - (vec){0}; }
static inline vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* exp by x = n ln 2 + r and a Taylor polynomial in r, |r| < .35; clamped to the range of REAL, NaN stays NaN. */
static inline vec exponential(vec x) {
    static const double coefficient[] = {1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
        1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    x = choose(x < all(EXP_LOW), all(EXP_LOW), x);
    x = choose(x > all(EXP_HIGH), all(EXP_HIGH), x);
    vec rounded = x * (REAL)1.44269504088896340736 + (REAL)MAGIC;
    vec n = rounded - (REAL)MAGIC;
    vec r = x - n * (REAL)LN2_HIGH - n * (REAL)LN2_LOW;
    vec p = all((REAL)coefficient[TERMS]);
    for (int i = TERMS - 1; i >= 0; i--) p = p * r + (REAL)coefficient[i];
    ivec power = ((ivec)rounded - (ivec)all((REAL)MAGIC) + BIAS) << MANTISSA;
    return p * (vec)power;
}

static inline vec sigmoid(vec z) {
    vec s = (REAL)1 / ((REAL)1 + exponential(-z));
    return choose(z < all(-(REAL)EXP_HIGH), all(0), s);
}

/* z[o] = b[o] + sum_i w[o][i] a[i], four rows at a time. */
static void affine(int out, int in, int nb, const REAL *w, const REAL *b, const vec *a, vec *z) {
    int o = 0;
    for (; o + 4 <= out; o += 4)
        for (int t = 0; t < nb; t++) {
            const REAL *w0 = w + o * in, *w1 = w0 + in, *w2 = w1 + in, *w3 = w2 + in;
            vec z0 = all(b[o]), z1 = all(b[o + 1]), z2 = all(b[o + 2]), z3 = all(b[o + 3]);
            for (int i = 0; i < in; i++) {
                vec x = a[i * nb + t];
                z0 += w0[i] * x; z1 += w1[i] * x; z2 += w2[i] * x; z3 += w3[i] * x;
            }
            z[o * nb + t] = z0; z[(o + 1) * nb + t] = z1; z[(o + 2) * nb + t] = z2; z[(o + 3) * nb + t] = z3;
        }
    for (; o < out; o++)
        for (int t = 0; t < nb; t++) {
            vec sum = all(b[o]);
            for (int i = 0; i < in; i++) sum += w[o * in + i] * a[i * nb + t];
            z[o * nb + t] = sum;
        }
}

/* z becomes the gradient of the mean loss at z; adds up losses and right answers. Padded samples have y = -1 and
 * gradient zero. */
static void cross_entropy(int classes, int batch, int nb, const vec *y, vec *z, double *loss, double *correct) {
    double sum = 0, right = 0, product = 1;
    for (int t = 0; t < nb; t++) {
        vec top = z[t], best = all(0), zero = z[t] * (REAL)0, total = all(0), own = all(0);
        for (int c = 1; c < classes; c++) {
            vec v = z[c * nb + t];
            ivec larger = v > top;
            top = choose(larger, v, top);
            best = choose(larger, all((REAL)c), best);
            zero += v * (REAL)0; /* NaN as soon as one output is not finite */
        }
        for (int c = 0; c < classes; c++) {
            vec v = z[c * nb + t] - top;
            own = choose(y[t] == all((REAL)c), v, own);
            z[c * nb + t] = v = exponential(v);
            total += v;
        }
        ivec real = y[t] >= all(0);
        vec scale = choose(real, (REAL)1 / (total * (REAL)batch), all(0));
        for (int c = 0; c < classes; c++)
            z[c * nb + t] = z[c * nb + t] * scale - choose(y[t] == all((REAL)c), all((REAL)1 / (REAL)batch), all(0));
        ivec hit = real & (best == y[t]) & (zero == all(0));
        for (int j = 0; j < LANES && t * LANES + j < batch; j++) {
            right += hit[j] ? 1 : 0;
            sum -= own[j];
            product *= total[j];
            if (j % 8 == 7) { sum += log(product); product = 1; } /* one logarithm for eight samples */
        }
    }
    *loss += sum + log(product);
    *correct += right;
}

/* Vectors of one sample's inputs and a one, side by side. */
static inline int row_vectors(int in) { return (in + LANES) / LANES; }

/* gw[o][i] = sum_b g[o][b] a[i][b] and gb[o] = sum_b g[o][b] (the input that is one), as outer products of samples:
 * four rows at a time, even and odd samples apart, so that eight sums are under way at once. */
static void weight_gradients(int out, int in, int padded, const REAL *g, const vec *rows, REAL *gw, REAL *gb) {
    int nv = row_vectors(in);
    for (int o = 0; o < out; o += 4) {
        const REAL *g0 = g + o * padded;
        const REAL *g1 = o + 1 < out ? g0 + padded : g0, *g2 = o + 2 < out ? g0 + 2 * padded : g0;
        const REAL *g3 = o + 3 < out ? g0 + 3 * padded : g0;
        for (int v = 0; v < nv; v++) {
            vec s[4] = {all(0), all(0), all(0), all(0)};
            vec a0 = all(0), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
            for (int b = 0; b < padded; b += 2) {
                vec p = rows[b * nv + v], q = rows[(b + 1) * nv + v];
                a0 += g0[b] * p; a1 += g1[b] * p; a2 += g2[b] * p; a3 += g3[b] * p;
                b0 += g0[b + 1] * q; b1 += g1[b + 1] * q; b2 += g2[b + 1] * q; b3 += g3[b + 1] * q;
            }
            s[0] = a0 + b0; s[1] = a1 + b1; s[2] = a2 + b2; s[3] = a3 + b3;
            int columns = in - v * LANES < LANES ? in - v * LANES : LANES;
            for (int k = 0; k < 4 && o + k < out; k++) {
                memcpy(gw + (o + k) * in + v * LANES, s + k, columns * sizeof(REAL));
                if (columns < LANES) gb[o + k] = s[k][columns];
            }
        }
    }
}

typedef REAL quad __attribute__((vector_size(4 * sizeof(REAL))));
#define PICK __builtin_shufflevector

/* to[j][i] = from[i][j], i < m, j < n, both rounded up to blocks of 4 by 4 (which must exist); strides are whole quads. */
static void transpose(int m, int n, const REAL *from, int stride, REAL *to, int to_stride) {
    for (int i = 0; i < m; i += 4)
        for (int j = 0; j < n; j += 4) {
            const REAL *f = from + i * stride + j;
            quad r0 = *(const quad *)f, r1 = *(const quad *)(f + stride);
            quad r2 = *(const quad *)(f + 2 * stride), r3 = *(const quad *)(f + 3 * stride);
            quad p = PICK(r0, r1, 0, 4, 1, 5), q = PICK(r0, r1, 2, 6, 3, 7);
            quad r = PICK(r2, r3, 0, 4, 1, 5), s = PICK(r2, r3, 2, 6, 3, 7);
            REAL *t = to + j * to_stride + i;
            *(quad *)t = PICK(p, r, 0, 1, 4, 5);
            *(quad *)(t + to_stride) = PICK(p, r, 2, 3, 6, 7);
            *(quad *)(t + 2 * to_stride) = PICK(q, s, 0, 1, 4, 5);
            *(quad *)(t + 3 * to_stride) = PICK(q, s, 2, 3, 6, 7);
        }
}

/* back[i] = f'(z[i]) sum_o w[o][i] g[o]; silu: 1 = SiLU, 0 = ReLU. */
static void back_through(int out, int in, int nb, int silu, const REAL *w, const vec *g, const vec *z, vec *back) {
    for (int i = 0; i < in; i++)
        for (int t = 0; t < nb; t++) {
            vec sum = all(0), at = z[i * nb + t];
            for (int o = 0; o < out; o++) sum += w[o * in + i] * g[o * nb + t];
            if (silu) {
                vec s = sigmoid(at);
                sum *= s * ((REAL)1 + at * ((REAL)1 - s));
            } else {
                sum = choose(at <= all(0), all(0), sum);
            }
            back[i * nb + t] = sum;
        }
}

/* Where a call keeps what: labels, inputs of every layer (a) and outputs before the activation (z), samples last; a
 * again with samples first and a one behind each (row); two vectors per unit and sample for the way back. */
struct room {
    vec *labels, **z, **a, **row, *spare[2];
};

/* Vectors of scratch that a call needs. */
int64_t scratch_vectors(int batch, int layers, const int32_t *widths) {
    int64_t rows = 4 + widths[0], widest = 0; /* up to three rows more than inputs, see transpose */
    for (int l = 1; l <= layers; l++) {
        rows += 2 * widths[l];
        if (widths[l] > widest) widest = widths[l];
    }
    int64_t nb = (batch + LANES - 1) / LANES, all_rows = 0;
    for (int l = 0; l < layers; l++) all_rows += row_vectors(widths[l]) * nb * LANES;
    return (rows + 2 * widest) * nb + all_rows;
}

/* Divides the scratch, all zero afterwards; batch samples, padded to nb vectors. */
static void lay_out(struct room *r, int batch, int nb, int layers, const int32_t *widths, vec *scratch) {
    int64_t widest = 0, rows = 4 + widths[0];
    memset(scratch, 0, scratch_vectors(batch, layers, widths) * sizeof(vec));
    r->labels = scratch;
    r->a[0] = scratch + nb;
    for (int l = 0; l < layers; l++) {
        r->z[l] = scratch + rows * nb;
        if (l + 1 < layers) r->a[l + 1] = r->z[l] + widths[l + 1] * nb;
        rows += 2 * widths[l + 1];
        if (widths[l + 1] > widest) widest = widths[l + 1];
    }
    r->spare[0] = scratch + rows * nb;
    r->spare[1] = scratch + (rows + widest) * nb;
    r->row[0] = r->spare[1] + widest * nb;
    for (int l = 1; l < layers; l++) r->row[l] = r->row[l - 1] + (int64_t)row_vectors(widths[l - 1]) * nb * LANES;
}

/* Takes the samples index[0] to index[batch - 1] of the set (index null: the first ones) into the room. */
static void gather(struct room *r, int batch, int nb, int in, const REAL *x, const int64_t *y, const int64_t *index) {
    int stride = row_vectors(in) * LANES, padded = nb * LANES;
    REAL *labels = (REAL *)r->labels, *first = (REAL *)r->row[0];
    for (int j = 0; j < batch; j++) {
        int64_t sample = index ? index[j] : j;
        labels[j] = (REAL)y[sample];
        memcpy(first + j * stride, x + sample * in, in * sizeof(REAL));
        first[j * stride + in] = 1;
    }
    for (int j = batch; j < padded; j++) labels[j] = -1;
    transpose(padded, in, first, stride, (REAL *)r->a[0], padded);
}

/* Forward pass of member m. stride: elements from one member to the next, of every w, then of every b. */
static void forward(struct room *r, int m, int nb, int layers, const int32_t *widths, int silu, REAL *const *w,
                    REAL *const *b, const int64_t *stride) {
    for (int l = 0; l < layers; l++) {
        int in = widths[l], out = widths[l + 1];
        const vec *z = r->z[l];
        affine(out, in, nb, w[l] + m * stride[l], b[l] + m * stride[layers + l], r->a[l], r->z[l]);
        if (l + 1 < layers)
            for (int k = 0; k < out * nb; k++)
                r->a[l + 1][k] = silu ? z[k] * sigmoid(z[k]) : choose(z[k] <= all(0), all(0), z[k]);
    }
}

/* x [n, widths[0]] and y [n] hold the training set, index [members, batch] says which samples each member sees;
 * w, b, gw, gb: one pointer per layer to [members, …], stride and grad_stride as in forward; scratch: 64-byte aligned. */
void step(int members, int batch, int layers, const int32_t *widths, int silu, const REAL *x, const int64_t *y,
          const int64_t *index, REAL *const *w, REAL *const *b, const int64_t *stride, REAL *const *gw, REAL *const *gb,
          const int64_t *grad_stride, REAL *loss, REAL *accuracy, vec *scratch) {
    int nb = (batch + LANES - 1) / LANES, padded = nb * LANES;
    vec *z[layers], *a[layers], *row[layers];
    struct room r = {.z = z, .a = a, .row = row};
    lay_out(&r, batch, nb, layers, widths, scratch);
    for (int m = 0; m < members; m++) {
        double sum = 0, right = 0;
        gather(&r, batch, nb, widths[0], x, y, index + (int64_t)m * batch);
        forward(&r, m, nb, layers, widths, silu, w, b, stride);
        cross_entropy(widths[layers], batch, nb, r.labels, z[layers - 1], &sum, &right);
        loss[m] = (REAL)(sum / batch);
        accuracy[m] = (REAL)(right / batch);
        const vec *g = z[layers - 1];
        for (int l = layers - 1; l >= 0; l--) {
            int in = widths[l], out = widths[l + 1];
            if (l > 0) {
                int to = row_vectors(in) * LANES;
                transpose(in, padded, (const REAL *)a[l], padded, (REAL *)row[l], to);
                for (int j = 0; j < batch; j++) ((REAL *)row[l])[j * to + in] = 1;
            }
            weight_gradients(out, in, padded, (const REAL *)g, row[l], gw[l] + m * grad_stride[l],
                             gb[l] + m * grad_stride[layers + l]);
            if (l > 0) {
                back_through(out, in, nb, silu, w[l] + m * stride[l], g, z[l - 1], r.spare[l % 2]);
                g = r.spare[l % 2];
            }
        }
    }
}

/* Mean loss and accuracy of the members rows[0] to rows[members - 1] (rows null: the first ones) on the whole set
 * x [n, widths[0]], y [n], taken batch samples at a time; scratch as for a step of batch samples. */
void evaluate(int members, const int64_t *rows, int64_t n, int batch, int layers, const int32_t *widths, int silu,
              const REAL *x, const int64_t *y, REAL *const *w, REAL *const *b, const int64_t *stride, double *loss, double *accuracy,
              vec *scratch) {
    int nb = (batch + LANES - 1) / LANES;
    vec *z[layers], *a[layers], *row[layers];
    struct room r = {.z = z, .a = a, .row = row};
    lay_out(&r, batch, nb, layers, widths, scratch);
    for (int m = 0; m < members; m++) loss[m] = accuracy[m] = 0;
    for (int64_t first = 0; first < n; first += batch) {
        int count = n - first < batch ? (int)(n - first) : batch;
        gather(&r, count, nb, widths[0], x + first * widths[0], y + first, NULL);
        for (int m = 0; m < members; m++) {
            forward(&r, rows ? (int)rows[m] : m, nb, layers, widths, silu, w, b, stride);
            cross_entropy(widths[layers], count, nb, r.labels, z[layers - 1], loss + m, accuracy + m);
        }
    }
    for (int m = 0; m < members; m++) {
        loss[m] /= n;
        accuracy[m] /= n;
    }
}
