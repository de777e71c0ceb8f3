// One FOAM step of a float32 matrix, the arithmetic of functional.py in a single pass over memory.
//
// A row consists of blocks of `width` columns, the last one perhaps shorter. The width of short
// blocks is a compile-time constant, without which the compiler does not vectorise across blocks.

#include <cmath>
#include <cstdint>

struct Factors {
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float decay;             // 1 - lr * weight_decay
  float step_size;         // lr * scale / bias correction 1
  float residual;          // rho; times bias correction 1 if only the moments are corrected
  float residual_square;   // rho**2; likewise times bias correction 2
  float inverse_sqrt_bc2;  // 1 / sqrt(bias correction 2)
};

static inline float new_weight(float weight, float mean, float square, float residual,
                          const Factors& f) {
  const float numerator = mean + f.residual * residual;
  const float root = std::sqrt(square + f.residual_square * residual * residual);
  return f.decay * weight - f.step_size * numerator / (root * f.inverse_sqrt_bc2 + f.eps);
}

template <bool mean_square>
static inline void update_moments(float* exp_avg, float* exp_avg_sq, float mean,
                                  float mean_of_squares, const Factors& f) {
  const float second = mean_square ? mean_of_squares : mean * mean;
  *exp_avg += (mean - *exp_avg) * f.one_minus_beta1;
  *exp_avg_sq = *exp_avg_sq * f.beta2 + second * f.one_minus_beta2;
}

template <int width, bool mean_square>
static void update_short(int64_t count, float* __restrict param, const float* __restrict grad,
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
    update_moments<mean_square>(exp_avg + k, exp_avg_sq + k, mean, squares * (1.0f / width), f);
    for (int j = 0; j < width; j++)
      param[k * width + j] =
          new_weight(param[k * width + j], exp_avg[k], exp_avg_sq[k], g[j] - mean, f);
  }
}

template <bool mean_square>
static void update_long(int64_t count, int64_t width, float* __restrict param,
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
    update_moments<mean_square>(exp_avg + k, exp_avg_sq + k, mean, squares * share, f);
    const float m = exp_avg[k], v = exp_avg_sq[k];
#pragma omp simd
    for (int64_t j = 0; j < width; j++) param[j] = new_weight(param[j], m, v, grad[j] - mean, f);
  }
}

template <bool mean_square>
static void update_blocks(int64_t count, int64_t width, float* param, const float* grad,
                          float* exp_avg, float* exp_avg_sq, const Factors& f) {
  switch (width) {
    case 1: return update_short<1, mean_square>(count, param, grad, exp_avg, exp_avg_sq, f);
    case 2: return update_short<2, mean_square>(count, param, grad, exp_avg, exp_avg_sq, f);
    case 4: return update_short<4, mean_square>(count, param, grad, exp_avg, exp_avg_sq, f);
    case 8: return update_short<8, mean_square>(count, param, grad, exp_avg, exp_avg_sq, f);
    case 16: return update_short<16, mean_square>(count, param, grad, exp_avg, exp_avg_sq, f);
    default: return update_long<mean_square>(count, width, param, grad, exp_avg, exp_avg_sq, f);
  }
}

template <bool mean_square>
static void update_rows(int64_t rows, int64_t columns, int64_t width, float* param,
                      const float* grad, float* exp_avg, float* exp_avg_sq, const Factors& f) {
  const int64_t full = columns / width, rest = columns % width;
  if (rest == 0) {  // all rows together are one run of full blocks
    update_blocks<mean_square>(rows * full, width, param, grad, exp_avg, exp_avg_sq, f);
    return;
  }
  const int64_t blocks_per_row = full + 1;
  for (int64_t r = 0; r < rows; r++) {
    float* p = param + r * columns;
    const float* g = grad + r * columns;
    float *m = exp_avg + r * blocks_per_row, *v = exp_avg_sq + r * blocks_per_row;
    update_blocks<mean_square>(full, width, p, g, m, v, f);
    update_long<mean_square>(1, rest, p + full * width, g + full * width, m + full, v + full, f);
  }
}

extern "C" void foam_step(int64_t rows, int64_t columns, int64_t width, int threads,
                          int mean_square, float* param, const float* grad, float* exp_avg,
                          float* exp_avg_sq, const Factors* factors) {
  const int64_t blocks_per_row = (columns + width - 1) / width;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; part++) {
    const int64_t first = rows * part / threads, last = rows * (part + 1) / threads;
    (mean_square ? update_rows<true> : update_rows<false>)(
        last - first, columns, width, param + first * columns, grad + first * columns,
        exp_avg + first * blocks_per_row, exp_avg_sq + first * blocks_per_row, *factors);
  }
}
