/* Per member of stacked tensors: Euclidean norms, numbers of non-finite elements, largest magnitudes, in one pass.
 * REAL is float or double. leaf[l] points to [members, size[l]], members stride[l] elements apart. Sums are double; a NaN stays with its member. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#ifdef DOUBLE
typedef int64_t word;
#else
typedef int32_t word;
#endif

/* norm: of leaf - minus, the difference taken in REAL (minus null: of leaf); nonfinite: NaN or infinite elements of leaf. */
void norms(int64_t members, int leaves, const int64_t *size, const int64_t *stride, REAL *const *leaf,
           const int64_t *minus_stride, REAL *const *minus, double *norm, int64_t *nonfinite) {
    for (int64_t m = 0; m < members; m++) {
        double squares = 0;
        int64_t bad = 0;
        for (int l = 0; l < leaves; l++) {
            const REAL *x = leaf[l] + m * stride[l], *y = minus ? minus[l] + m * minus_stride[l] : NULL;
            if (y) {
#pragma omp simd reduction(+ : squares)
                for (int64_t i = 0; i < size[l]; i++) {
                    REAL d = x[i] - y[i];
                    squares += (double)d * (double)d;
                }
            } else {
#pragma omp simd reduction(+ : squares)
                for (int64_t i = 0; i < size[l]; i++) squares += (double)x[i] * (double)x[i];
            }
            word count = 0;
#pragma omp simd reduction(+ : count)
            for (int64_t i = 0; i < size[l]; i++) count += x[i] * 0 == 0 ? 0 : 1;
            bad += count;
        }
        norm[m] = sqrt(squares);
        nonfinite[m] = bad;
    }
}

/* top: largest |element| of all leaves; NaN where any is NaN. */
void largest(int64_t members, int leaves, const int64_t *size, const int64_t *stride, REAL *const *leaf, double *top) {
    for (int64_t m = 0; m < members; m++) {
        REAL most = 0;
        word nans = 0;
        for (int l = 0; l < leaves; l++) {
            const REAL *x = leaf[l] + m * stride[l];
#pragma omp simd reduction(max : most) reduction(| : nans)
            for (int64_t i = 0; i < size[l]; i++) {
                REAL a = x[i] < 0 ? -x[i] : x[i];
                most = a > most ? a : most;
                nans |= x[i] == x[i] ? 0 : 1;
            }
        }
        top[m] = nans ? NAN : (double)most;
    }
}
