/* Steps and evaluations of many small convolutional networks: convolutions, each with a bias or BatchNorm and a ReLU,
 * the mean over all pixels, one linear layer; equations in batched_cnn.py. As in plain_mlp.c one member at a time, with
 * samples last: a pixel of a channel is nb vectors, so a convolution is a sum of such pixels times weights. */
#include "plain_mlp.c"

/* One convolution: a [in][h][w] -> z [out][oh][ow], both of nb vectors each; square kernel, stride and zero padding. */
struct conv {
    int in, h, w, out, oh, ow, kernel, stride, pad;
};

/* The pairs (tap, pixel of the input) that make output pixel (y, x); how many. */
static int taps_of(const struct conv *c, int y, int x, int *tap, int *pixel) {
    int n = 0;
    for (int ky = 0; ky < c->kernel; ky++)
        for (int kx = 0; kx < c->kernel; kx++) {
            int v = y * c->stride + ky - c->pad, u = x * c->stride + kx - c->pad;
            if (v < 0 || u < 0 || v >= c->h || u >= c->w) continue;
            tap[n] = ky * c->kernel + kx;
            pixel[n++] = v * c->w + u;
        }
    return n;
}

/* The pairs (tap, pixel of the output) in which input pixel (v, u) has a part; how many. */
static int parts_of(const struct conv *c, int v, int u, int *tap, int *pixel) {
    int n = 0;
    for (int ky = 0; ky < c->kernel; ky++)
        for (int kx = 0; kx < c->kernel; kx++) {
            int y = v + c->pad - ky, x = u + c->pad - kx;
            if (y < 0 || x < 0 || y % c->stride || x % c->stride) continue;
            y /= c->stride;
            x /= c->stride;
            if (y >= c->oh || x >= c->ow) continue;
            tap[n] = ky * c->kernel + kx;
            pixel[n++] = y * c->ow + x;
        }
    return n;
}

/* to[r] = from[r] + sum over channels k and pairs i of weight[r * step + k * jump + tap[i]] * in[k][pixel[i]], for rows
 * rows and tile vectors. Constants after inlining, so that all sums stay in registers. */
static inline __attribute__((always_inline)) void pixel_sum(
    int rows, int tile, int channels, int n, const int *tap, const int *pixel, const REAL *weight, int64_t step,
    int64_t jump, const vec *in, int64_t plane, int nb, const REAL *start, vec *to, int64_t to_plane) {
    vec s[4][4];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t++) s[r][t] = all(start ? start[r] : 0);
    for (int k = 0; k < channels; k++)
        for (int i = 0; i < n; i++) {
            const vec *a = in + k * plane + (int64_t)pixel[i] * nb;
            const REAL *w = weight + k * jump + tap[i];
            for (int r = 0; r < rows; r++)
                for (int t = 0; t < tile; t++) s[r][t] += w[r * step] * a[t];
        }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tile; t++) to[r * to_plane + t] = s[r][t];
}

static void pixel_rows(int rows, int channels, int n, const int *tap, const int *pixel, const REAL *weight, int64_t step,
                       int64_t jump, const vec *in, int64_t plane, int nb, const REAL *start, vec *to,
                       int64_t to_plane) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
        const REAL *b = start ? start + r : NULL, *w = weight + r * step;
        int t = 0;
        for (; t + 4 <= nb; t += 4)
            pixel_sum(4, 4, channels, n, tap, pixel, w, step, jump, in + t, plane, nb, b, to + r * to_plane + t, to_plane);
        for (; t < nb; t++)
            pixel_sum(4, 1, channels, n, tap, pixel, w, step, jump, in + t, plane, nb, b, to + r * to_plane + t, to_plane);
    }
    for (; r < rows; r++)
        for (int t = 0; t < nb; t++)
            pixel_sum(1, 1, channels, n, tap, pixel, weight + r * step, step, jump, in + t, plane, nb,
                      start ? start + r : NULL, to + r * to_plane + t, to_plane);
}

/* z = w * a (+ b); w [out][in][kernel * kernel]. */
static void convolve(const struct conv *c, int nb, const REAL *w, const REAL *b, const vec *a, vec *z) {
    int area = c->kernel * c->kernel, tap[area], pixel[area];
    for (int y = 0; y < c->oh; y++)
        for (int x = 0; x < c->ow; x++) {
            int n = taps_of(c, y, x, tap, pixel);
            pixel_rows(c->out, c->in, n, tap, pixel, w, (int64_t)c->in * area, area, a, (int64_t)c->h * c->w * nb, nb, b,
                       z + (int64_t)(y * c->ow + x) * nb, (int64_t)c->oh * c->ow * nb);
        }
}

/* back = the gradient at a, from g at z. */
static void convolve_back(const struct conv *c, int nb, const REAL *w, const vec *g, vec *back) {
    int area = c->kernel * c->kernel, tap[area], pixel[area];
    for (int v = 0; v < c->h; v++)
        for (int u = 0; u < c->w; u++) {
            int n = parts_of(c, v, u, tap, pixel);
            pixel_rows(c->in, c->out, n, tap, pixel, w, area, (int64_t)c->in * area, g, (int64_t)c->oh * c->ow * nb, nb,
                       NULL, back + (int64_t)(v * c->w + u) * nb, (int64_t)c->h * c->w * nb);
        }
}

/* The sum of the lanes, halves onto each other. */
static inline REAL across(vec v) {
    for (int i = LANES / 2; i > 0; i /= 2)
        for (int j = 0; j < i; j++) v[j] += v[j + i];
    return v[0];
}

static inline __attribute__((always_inline)) void tap_gradient(
    int rows, int columns, const struct conv *c, int nb, int ky, int kx, const vec *g, const vec *a, REAL *gw) {
    int area = c->kernel * c->kernel;
    int64_t planes = (int64_t)c->h * c->w * nb, from = (int64_t)c->oh * c->ow * nb;
    vec s[4][4];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < columns; k++) s[r][k] = all(0);
    for (int y = 0; y < c->oh; y++)
        for (int x = 0; x < c->ow; x++) {
            int v = y * c->stride + ky - c->pad, u = x * c->stride + kx - c->pad;
            if (v < 0 || u < 0 || v >= c->h || u >= c->w) continue;
            const vec *p = g + (int64_t)(y * c->ow + x) * nb, *q = a + (int64_t)(v * c->w + u) * nb;
            for (int t = 0; t < nb; t++)
                for (int r = 0; r < rows; r++)
                    for (int k = 0; k < columns; k++) s[r][k] += p[r * from + t] * q[k * planes + t];
        }
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < columns; k++) gw[((int64_t)r * c->in + k) * area + ky * c->kernel + kx] = across(s[r][k]);
}

/* gw [out][in][kernel * kernel] from g at z and the input a. */
static void kernel_gradient(const struct conv *c, int nb, const vec *g, const vec *a, REAL *gw) {
    int64_t area = (int64_t)c->kernel * c->kernel, planes = (int64_t)c->h * c->w * nb, from = (int64_t)c->oh * c->ow * nb;
    for (int ky = 0; ky < c->kernel; ky++)
        for (int kx = 0; kx < c->kernel; kx++)
            for (int o = 0; o < c->out; o += 4)
                for (int k = 0; k < c->in; k += 4) {
                    const vec *p = g + o * from, *q = a + k * planes;
                    REAL *to = gw + (o * (int64_t)c->in + k) * area;
                    int rows = c->out - o < 4 ? c->out - o : 4, columns = c->in - k < 4 ? c->in - k : 4;
                    if (rows == 4 && columns == 4) tap_gradient(4, 4, c, nb, ky, kx, p, q, to);
                    else if (rows == 4 && columns == 1) tap_gradient(4, 1, c, nb, ky, kx, p, q, to);
                    else
                        for (int r = 0; r < rows; r++)
                            for (int j = 0; j < columns; j++)
                                tap_gradient(1, 1, c, nb, ky, kx, p + r * from, q + j * planes, to + (r * (int64_t)c->in + j) * area);
                }
}

/* Sums of one channel (pixels times nb vectors) over the real samples; rest: lanes of the last vector that are real. */
static double total(int pixels, int nb, ivec rest, const vec *v, int squared, REAL mean) {
    double sum = 0;
    vec s = all(0);
    for (int i = 0; i < pixels; i++)
        for (int t = 0; t < nb; t++) {
            vec d = v[i * nb + t] - mean;
            if (squared) d *= d;
            s += t + 1 < nb ? d : choose(rest, d, all(0));
        }
    for (int j = 0; j < LANES; j++) sum += s[j];
    return sum;
}

/* What a member's forward pass leaves behind: a[l] inputs of convolution l, a[layers] the last output, z before BatchNorm
 * or ReLU, mean, variance and scale (1 / standard deviation) of every channel of every layer. */
struct net {
    int layers, nb, batch, normed;
    const struct conv *c;
    vec **a, **z, *pooled, *outputs, *labels, *spare[2];
    REAL **mean, **variance, **scale;
    ivec rest;
};

/* Parameters of one member: kernel, then bias or BatchNorm's weight and bias, of every convolution; head's two. */
static void forward_convolutions(struct net *n, REAL *const *p, REAL *const *stats, double eps) {
    int per = n->normed ? 3 : 2;
    for (int l = 0; l < n->layers; l++) {
        const struct conv *c = n->c + l;
        int pixels = c->oh * c->ow, all_of = pixels * n->nb;
        convolve(c, n->nb, p[l * per], n->normed ? NULL : p[l * per + 1], n->a[l], n->z[l]);
        for (int o = 0; o < c->out; o++) {
            vec *z = n->z[l] + (int64_t)o * all_of, *to = n->a[l + 1] + (int64_t)o * all_of;
            REAL gain = 1, shift = 0;
            if (n->normed) {
                if (!stats) { /* of the batch */
                    double count = (double)pixels * n->batch;
                    REAL mean = (REAL)(total(pixels, n->nb, n->rest, z, 0, 0) / count);
                    double variance = total(pixels, n->nb, n->rest, z, 1, mean) / count;
                    n->mean[l][o] = mean;
                    n->variance[l][o] = (REAL)variance;
                    n->scale[l][o] = (REAL)(1 / sqrt(variance + eps));
                } else {
                    n->mean[l][o] = stats[2 * l][o];
                    n->scale[l][o] = (REAL)(1 / sqrt((double)stats[2 * l + 1][o] + eps));
                }
                gain = n->scale[l][o] * p[l * per + 1][o];
                shift = p[l * per + 2][o] - n->mean[l][o] * gain;
            }
            for (int i = 0; i < all_of; i++) {
                vec v = n->normed ? z[i] * gain + shift : z[i];
                to[i] = choose(v <= all(0), all(0), v);
            }
        }
    }
    const struct conv *c = n->c + n->layers - 1;
    int pixels = c->oh * c->ow;
    for (int o = 0; o < c->out; o++)
        for (int t = 0; t < n->nb; t++) {
            vec s = all(0);
            for (int i = 0; i < pixels; i++) s += n->a[n->layers][(int64_t)(o * pixels + i) * n->nb + t];
            n->pooled[o * n->nb + t] = s / (REAL)pixels;
        }
}

/* g, the gradient at the output of layer l after ReLU, becomes that at z; gradients of bias or of BatchNorm's two. */
static void back_through_norm(struct net *n, int l, REAL *const *p, vec *g, REAL *const *grad) {
    const struct conv *c = n->c + l;
    int pixels = c->oh * c->ow, nb = n->nb, all_of = pixels * nb, per = n->normed ? 3 : 2;
    for (int o = 0; o < c->out; o++) {
        vec *at = g + (int64_t)o * all_of, *z = n->z[l] + (int64_t)o * all_of;
        const vec *out = n->a[l + 1] + (int64_t)o * all_of;
        vec sum = all(0), product = all(0);
        REAL mean = n->normed ? n->mean[l][o] : 0, scale = n->normed ? n->scale[l][o] : 1;
        for (int i = 0; i < all_of; i++) { /* padded samples have gradient zero */
            vec d = at[i] = choose(out[i] <= all(0), all(0), at[i]);
            sum += d;
            product += d * ((z[i] - mean) * scale);
        }
        double beta = 0, gamma = 0;
        for (int j = 0; j < LANES; j++) beta += sum[j], gamma += product[j];
        if (!n->normed) {
            grad[l * per + 1][o] = (REAL)beta;
            continue;
        }
        grad[l * per + 1][o] = (REAL)gamma;
        grad[l * per + 2][o] = (REAL)beta;
        double count = (double)pixels * n->batch;
        REAL gain = p[l * per + 1][o] * scale, level = (REAL)(beta / count), slope = (REAL)(gamma / count);
        for (int i = 0; i < pixels; i++)
            for (int t = 0; t < nb; t++) {
                int k = i * nb + t;
                vec d = gain * (at[k] - level - (z[k] - mean) * scale * slope);
                at[k] = t + 1 < nb ? d : choose(n->rest, d, all(0));
            }
    }
}

/* Vectors of scratch for batch samples; shape: in, h, w, out, oh, ow of every convolution. */
static int64_t planes(int layers, const int32_t *shape, int64_t *widest) {
    int64_t sum = 4 + (int64_t)shape[0] * shape[1] * shape[2];
    *widest = 0;
    for (int l = 0; l < layers; l++) {
        const int32_t *s = shape + 6 * l;
        int64_t in = (int64_t)s[0] * s[1] * s[2], out = (int64_t)s[3] * s[4] * s[5];
        if (out > *widest) *widest = out;
        if (l && in > *widest) *widest = in;
        sum += 2 * out;
    }
    return sum;
}

int64_t cnn_scratch_vectors(int batch, int layers, const int32_t *shape, int classes) {
    int64_t widest, nb = (batch + LANES - 1) / LANES, sum = planes(layers, shape, &widest);
    int64_t channels = shape[6 * layers - 3], inputs = (int64_t)shape[0] * shape[1] * shape[2], kept = 0;
    for (int l = 0; l < layers; l++) kept += 3 * ((shape[6 * l + 3] + LANES - 1) / LANES);
    return nb * (sum + 2 * widest + channels + classes + 1) + row_vectors((int)inputs) * nb * LANES + kept;
}

/* Divides the scratch, all zero afterwards. */
static void arrange(struct net *n, const int32_t *shape, int classes, vec *scratch, vec **row) {
    int64_t widest, nb = n->nb;
    planes(n->layers, shape, &widest);
    memset(scratch, 0, cnn_scratch_vectors(n->batch, n->layers, shape, classes) * sizeof(vec));
    n->labels = scratch;
    scratch += nb;
    n->a[0] = scratch;
    scratch += nb * (4 + (int64_t)shape[0] * shape[1] * shape[2]);
    for (int l = 0; l < n->layers; l++) {
        int64_t size = nb * n->c[l].out * n->c[l].oh * n->c[l].ow;
        n->z[l] = scratch;
        n->a[l + 1] = scratch + size;
        scratch += 2 * size;
    }
    for (int i = 0; i < 2; i++, scratch += nb * widest) n->spare[i] = scratch;
    n->pooled = scratch;
    scratch += nb * n->c[n->layers - 1].out;
    n->outputs = scratch;
    scratch += nb * classes;
    for (int l = 0; l < n->layers; l++) {
        int64_t size = (n->c[l].out + LANES - 1) / LANES;
        n->mean[l] = (REAL *)scratch;
        n->variance[l] = (REAL *)(scratch + size);
        n->scale[l] = (REAL *)(scratch + 2 * size);
        scratch += 3 * size;
    }
    *row = scratch;
}

static void describe(struct conv *c, int layers, const int32_t *shape, int kernel, int stride, int pad) {
    for (int l = 0; l < layers; l++, shape += 6)
        c[l] = (struct conv){shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], kernel, stride, pad};
}

static void real_lanes(struct net *n, int batch) {
    for (int j = 0; j < LANES; j++) n->rest[j] = batch - (n->nb - 1) * LANES > j ? -1 : 0;
}

/* As step of plain_mlp.c. p, grad: tensors (see forward_convolutions) to [members, …], stride and grad_stride apart;
 * stats: running mean and variance of every layer [members, …], stat_stride apart, brought up to date in place by
 * momentum (null without BatchNorm). */
void cnn_step(int members, int batch, int layers, const int32_t *shape, int kernel, int stride_of, int pad, int classes,
              int normed, double eps, double momentum, const REAL *x, const int64_t *y, const int64_t *index,
              REAL *const *p, const int64_t *stride, REAL *const *grad, const int64_t *grad_stride, REAL *const *stats,
              const int64_t *stat_stride, REAL *loss, REAL *accuracy, vec *scratch) {
    struct conv c[layers];
    vec *a[layers + 1], *z[layers], *row;
    REAL *mean[layers], *variance[layers], *scale[layers];
    describe(c, layers, shape, kernel, stride_of, pad);
    int nb = (batch + LANES - 1) / LANES, inputs = c[0].in * c[0].h * c[0].w, per = normed ? 3 : 2;
    int tensors = layers * per + 2, channels = c[layers - 1].out, pixels = c[layers - 1].oh * c[layers - 1].ow;
    struct net n = {.layers = layers, .nb = nb, .batch = batch, .normed = normed, .c = c, .a = a, .z = z,
                    .mean = mean, .variance = variance, .scale = scale};
    real_lanes(&n, batch);
    arrange(&n, shape, classes, scratch, &row);
    struct room r = {.labels = n.labels, .a = a, .row = &row};
    for (int m = 0; m < members; m++) {
        REAL *own[tensors], *to[tensors];
        double sum = 0, right = 0;
        for (int i = 0; i < tensors; i++) own[i] = p[i] + m * stride[i], to[i] = grad[i] + m * grad_stride[i];
        gather(&r, batch, nb, inputs, x, y, index + (int64_t)m * batch);
        forward_convolutions(&n, own, NULL, eps);
        for (int l = 0; normed && l < layers; l++) {
            double count = (double)c[l].oh * c[l].ow * batch, unbiased = count / (count - 1), keep = 1 - momentum;
            REAL *means = stats[2 * l] + m * stat_stride[2 * l], *variances = stats[2 * l + 1] + m * stat_stride[2 * l + 1];
            for (int o = 0; o < c[l].out; o++) {
                means[o] = (REAL)(momentum * mean[l][o] + keep * means[o]);
                variances[o] = (REAL)(momentum * unbiased * n.variance[l][o] + keep * variances[o]);
            }
        }
        affine(classes, channels, nb, own[tensors - 2], own[tensors - 1], n.pooled, n.outputs);
        cross_entropy(classes, batch, nb, n.labels, n.outputs, &sum, &right);
        loss[m] = (REAL)(sum / batch);
        accuracy[m] = (REAL)(right / batch);
        vec *g = n.spare[layers % 2], *o = n.outputs;
        for (int k = 0; k < classes; k++) {
            vec bias = all(0);
            for (int t = 0; t < nb; t++) bias += o[k * nb + t];
            to[tensors - 1][k] = across(bias);
            for (int i = 0; i < channels; i++) {
                vec s = all(0);
                for (int t = 0; t < nb; t++) s += o[k * nb + t] * n.pooled[i * nb + t];
                to[tensors - 2][k * channels + i] = across(s);
            }
        }
        for (int i = 0; i < channels; i++)
            for (int t = 0; t < nb; t++) {
                vec s = all(0);
                for (int k = 0; k < classes; k++) s += own[tensors - 2][k * channels + i] * o[k * nb + t];
                for (int q = 0; q < pixels; q++) g[(int64_t)(i * pixels + q) * nb + t] = s / (REAL)pixels;
            }
        for (int l = layers - 1; l >= 0; l--) {
            back_through_norm(&n, l, own, g, to);
            kernel_gradient(c + l, nb, g, a[l], to[l * per]);
            if (l > 0) {
                convolve_back(c + l, nb, own[l * per], g, n.spare[l % 2]);
                g = n.spare[l % 2];
            }
        }
    }
}

/* As evaluate of plain_mlp.c, with the running statistics. */
void cnn_evaluate(int members, const int64_t *rows, int64_t count, int batch, int layers, const int32_t *shape, int kernel, int stride_of,
                  int pad, int classes, int normed, double eps, const REAL *x, const int64_t *y, REAL *const *p,
                  const int64_t *stride, REAL *const *stats, const int64_t *stat_stride, double *loss, double *accuracy,
                  vec *scratch) {
    struct conv c[layers];
    vec *a[layers + 1], *z[layers], *row;
    REAL *mean[layers], *variance[layers], *scale[layers];
    describe(c, layers, shape, kernel, stride_of, pad);
    int nb = (batch + LANES - 1) / LANES, inputs = c[0].in * c[0].h * c[0].w, per = normed ? 3 : 2;
    int tensors = layers * per + 2;
    struct net n = {.layers = layers, .nb = nb, .batch = batch, .normed = normed, .c = c, .a = a, .z = z,
                    .mean = mean, .variance = variance, .scale = scale};
    arrange(&n, shape, classes, scratch, &row);
    struct room r = {.labels = n.labels, .a = a, .row = &row};
    for (int m = 0; m < members; m++) loss[m] = accuracy[m] = 0;
    for (int64_t first = 0; first < count; first += batch) {
        n.batch = count - first < batch ? (int)(count - first) : batch;
        gather(&r, n.batch, nb, inputs, x + first * inputs, y + first, NULL);
        for (int m = 0; m < members; m++) {
            REAL *own[tensors], *running[2 * layers];
            int64_t at = rows ? rows[m] : m;
            for (int i = 0; i < tensors; i++) own[i] = p[i] + at * stride[i];
            for (int i = 0; normed && i < 2 * layers; i++) running[i] = stats[i] + at * stat_stride[i];
            forward_convolutions(&n, own, normed ? running : NULL, eps);
            affine(classes, c[layers - 1].out, nb, own[tensors - 2], own[tensors - 1], n.pooled, n.outputs);
            cross_entropy(classes, n.batch, nb, n.labels, n.outputs, loss + m, accuracy + m);
        }
    }
    for (int m = 0; m < members; m++) {
        loss[m] /= count;
        accuracy[m] /= count;
    }
}
