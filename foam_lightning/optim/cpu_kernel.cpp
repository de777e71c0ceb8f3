// One FOAM step of a float32 matrix, the arithmetic of step.py in a single pass over memory.
//
// A row is cut into blocks of `width` columns, the last one perhaps shorter. The width of short
// blocks is a compile-time constant: only then does the compiler run several blocks side by side
// in a vector register.

#include <cmath>
#include <cstdint>

struct Factors {
  float gain1;            // 1 - beta1
  float beta2;
  float gain2;            // 1 - beta2
  float eps;
  float shrink;           // 1 - lr * weight_decay
  float size;             // lr * scale / bias correction 1
  float residual_mean;    // rho, and more where only the moments are bias-corrected
  float residual_square;  // likewise rho**2
  float inverse_root;     // 1 / sqrt(bias correction 2)
};

static inline float moved(float weight, float mean, float square, float residual,
                          const Factors& f) {
  const float numerator = mean + f.residual_mean * residual;
  const float root = std::sqrt(square + f.residual_square * residual * residual);
  return f.shrink * weight - f.size * numerator / (root * f.inverse_root + f.eps);
}

template <bool mean_square>
static inline void advance(float* exp_avg, float* exp_avg_sq, float mean, float mean_of_squares,
                           const Factors& f) {
  const float second = mean_square ? mean_of_squares : mean * mean;
  *exp_avg += (mean - *exp_avg) * f.gain1;
  *exp_avg_sq = *exp_avg_sq * f.beta2 + second * f.gain2;
}

template <int width, bool mean_square>
static void short_blocks(int64_t count, float* __restrict param, const float* __restrict grad,
                         float* __restrict exp_avg, float* __restrict exp_avg_sq,
                         const Factors f) {
#pragma GCC ivdep
  for (int64_t k = 0; k < count; k++) {
    float g[width], sum = 0, squares = 0;
    for (int j = 0; j < width; j++) {
      g[j] = grad[k * width + j];
      sum += g[j];
      squares += g[j] * g[j];
    }
    const float mean = sum * (1.0f / width);
    advance<mean_square>(exp_avg + k, exp_avg_sq + k, mean, squares * (1.0f / width), f);
    for (int j = 0; j < width; j++)
      param[k * width + j] =
          moved(param[k * width + j], exp_avg[k], exp_avg_sq[k], g[j] - mean, f);
  }
}

template <bool mean_square>
static void long_blocks(int64_t count, int64_t width, float* __restrict param,
                        const float* __restrict grad, float* __restrict exp_avg,
                        float* __restrict exp_avg_sq, const Factors f) {
  const float share = 1.0f / width;
  for (int64_t k = 0; k < count; k++, param += width, grad += width) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
    for (int64_t j = 0; j < width; j++) {
      sum += grad[j];
      squares += grad[j] * grad[j];
    }
    const float mean = sum * share;
    advance<mean_square>(exp_avg + k, exp_avg_sq + k, mean, squares * share, f);
    const float m = exp_avg[k], v = exp_avg_sq[k];
#pragma omp simd
    for (int64_t j = 0; j < width; j++) param[j] = moved(param[j], m, v, grad[j] - mean, f);
  }
}

template <bool mean_square>
static void blocks(int64_t count, int64_t width, float* param, const float* grad, float* exp_avg,
                   float* exp_avg_sq, const Factors& f) {
  switch (width) {
    case 1: return short_blocks<1, mean_square>(count, param, grad, exp_avg, exp_avg_sq, f);
    case 2: return short_blocks<2, mean_square>(count, param, grad, exp_avg, exp_avg_sq, f);
    case 4: return short_blocks<4, mean_square>(count, param, grad, exp_avg, exp_avg_sq, f);
    case 8: return short_blocks<8, mean_square>(count, param, grad, exp_avg, exp_avg_sq, f);
    case 16: return short_blocks<16, mean_square>(count, param, grad, exp_avg, exp_avg_sq, f);
    default: return long_blocks<mean_square>(count, width, param, grad, exp_avg, exp_avg_sq, f);
  }
}

template <bool mean_square>
static void some_rows(int64_t rows, int64_t columns, int64_t width, float* param,
                      const float* grad, float* exp_avg, float* exp_avg_sq, const Factors& f) {
  const int64_t full = columns / width, rest = columns % width;
  if (rest == 0) {  // the blocks of all rows lie one after the other
    blocks<mean_square>(rows * full, width, param, grad, exp_avg, exp_avg_sq, f);
    return;
  }
  const int64_t kept = full + 1;
  for (int64_t r = 0; r < rows; r++) {
    float* p = param + r * columns;
    const float* g = grad + r * columns;
    float *m = exp_avg + r * kept, *v = exp_avg_sq + r * kept;
    blocks<mean_square>(full, width, p, g, m, v, f);
    long_blocks<mean_square>(1, rest, p + full * width, g + full * width, m + full, v + full, f);
  }
}

extern "C" void foam_step(int64_t rows, int64_t columns, int64_t width, int threads,
                          int mean_square, float* param, const float* grad, float* exp_avg,
                          float* exp_avg_sq, const Factors* factors) {
  const int64_t kept = (columns + width - 1) / width;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; part++) {
    const int64_t first = rows * part / threads, last = rows * (part + 1) / threads;
    (mean_square ? some_rows<true> : some_rows<false>)(
        last - first, columns, width, param + first * columns, grad + first * columns,
        exp_avg + first * kept, exp_avg_sq + first * kept, *factors);
  }
}
