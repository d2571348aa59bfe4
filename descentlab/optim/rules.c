/* The update rules of torch.optim on n elements that lie side by side: the operations of torch's own loop in their order,
 * rounded after each, with one rounding where torch's kernels fuse a multiplication and an addition. Square roots are
 * taken by torch between two halves, for the library behind it need not round them as the processor does. compiled.py
 * compares the bits with torch's before anybody uses them. REAL is float or double. */
#include <stdint.h>

#pragma GCC optimize("fp-contract=off")
#pragma STDC FP_CONTRACT OFF

#ifdef DOUBLE
#define FMA __builtin_fma
#else
#define FMA __builtin_fmaf
#endif

/* decay: weight decay added to the gradient; 0 = none. */
#define DECAYED(g, p) (decay != 0 ? FMA(p, decay, g) : (g))

/* buffer null: without momentum. fresh: 1 - dampening. */
void sgd(int64_t n, REAL *restrict p, const REAL *restrict grad, REAL *restrict buffer, double rate, double momentum_,
         double fresh_, double decay_, int nesterov) {
    const REAL minus = (REAL)-rate, momentum = (REAL)momentum_, fresh = (REAL)fresh_, decay = (REAL)decay_;
    for (int64_t i = 0; i < n; i++) {
        REAL g = DECAYED(grad[i], p[i]);
        if (buffer) {
            REAL b = buffer[i] = FMA(g, fresh, buffer[i] * momentum);
            g = nesterov ? FMA(b, momentum, g) : b;
        }
        p[i] = FMA(g, minus, p[i]);
    }
}

/* First half of Adam's update: its moments. weight, fresh: 1 - beta1, 1 - beta2. */
void adam_moments(int64_t n, const REAL *restrict p, const REAL *restrict grad, REAL *restrict first,
                  REAL *restrict second, double weight_, double beta2_, double fresh_, double decay_) {
    const REAL weight = (REAL)weight_, beta2 = (REAL)beta2_, fresh = (REAL)fresh_, decay = (REAL)decay_;
    const int near = weight < (REAL)0.5;
    for (int64_t i = 0; i < n; i++) {
        REAL g = DECAYED(grad[i], p[i]), gap = g - first[i];
        first[i] = near ? FMA(weight, gap, first[i]) : FMA(weight - 1, gap, g);
        second[i] = FMA(fresh * g, g, second[i] * beta2);
    }
}

/* Second half. root: of the second moment; step: the rate over its bias correction, scale: root of the other one, keep:
 * what decoupled decay leaves of the weights (1 = all). */
void adam_move(int64_t n, REAL *restrict p, const REAL *restrict first, const REAL *restrict root, double step,
               double scale_, double eps_, double keep_) {
    const REAL minus = (REAL)-step, scale = (REAL)scale_, eps = (REAL)eps_, keep = (REAL)keep_;
    for (int64_t i = 0; i < n; i++) p[i] = (keep != 1 ? p[i] * keep : p[i]) + minus * first[i] / (root[i] / scale + eps);
}

/* First half of RMSprop's update: the mean square. fresh: 1 - alpha. */
void rmsprop_square(int64_t n, const REAL *restrict p, const REAL *restrict grad, REAL *restrict square, double alpha_,
                    double fresh_, double decay_) {
    const REAL alpha = (REAL)alpha_, fresh = (REAL)fresh_, decay = (REAL)decay_;
    for (int64_t i = 0; i < n; i++) {
        REAL g = DECAYED(grad[i], p[i]);
        square[i] = FMA(fresh * g, g, square[i] * alpha);
    }
}

/* Second half. root: of the mean square; buffer null: without momentum. */
void rmsprop_move(int64_t n, REAL *restrict p, const REAL *restrict grad, const REAL *restrict root,
                  REAL *restrict buffer, double rate, double eps_, double decay_, double momentum_) {
    const REAL minus = (REAL)-rate, eps = (REAL)eps_, decay = (REAL)decay_, momentum = (REAL)momentum_;
    for (int64_t i = 0; i < n; i++) {
        REAL g = DECAYED(grad[i], p[i]), scale = root[i] + eps;
        if (buffer) {
            REAL b = buffer[i] = buffer[i] * momentum + g / scale;
            p[i] = FMA(b, minus, p[i]);
        } else {
            p[i] = p[i] + minus * g / scale;
        }
    }
}
