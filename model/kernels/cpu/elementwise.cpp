// RMSNorm, clamped SwiGLU and interleaved RoPE on CPU (reference B.1, B.9, B.4): one pass over the data
// per call, fp32 inside. Rows are independent; sums over rows (the gradient of a norm's weight) are
// taken over one contiguous part a thread, then over the parts.
#include "vector.h"

namespace {

constexpr int PAIR_BUFFER = 1024;  // rotated channels at most

// y = x * rsqrt(mean x^2 + eps) * weight; weight may be null.
template <typename T>
void rms_norm(const T* x, const float* weight, float eps, long rows, long n, T* y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long i = 0; i < rows; ++i) {
    const T* from = x + i * n;
    vf square = {};
    for_chunks(n, [&](long k, auto chunk) {
      vf a = chunk.load(from + k);
      square += a * a;
    });
    vf r = splat(1.0f / __builtin_sqrtf(sum(square) / float(n) + eps));
    for_chunks(n, [&](long k, auto chunk) {
      vf a = chunk.load(from + k) * r;
      chunk.store(y + i * n + k, weight ? a * chunk.load(weight + k) : a);
    });
  }
}

// dx = r (g - x r^2 mean(g x)) with g = dy * weight; dweight = sum over rows of dy x r.
template <typename T>
void rms_norm_backward(const T* x, const float* weight, const T* dy, float eps, long rows, long n,
                       T* dx, float* dweight, int threads) {
  Parts partial(threads, weight ? round_up(n, 16) : 0);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int part = 0; part < threads; ++part) {
    float* mine = partial.zeroed(part);
    for (long i = rows * part / threads; i < rows * (part + 1) / threads; ++i) {
      const T *from = x + i * n, *grad = dy + i * n;
      vf square = {}, dot = {};
      for_chunks(n, [&](long k, auto chunk) {
        vf a = chunk.load(from + k), g = chunk.load(grad + k);
        square += a * a;
        dot += weight ? a * g * chunk.load(weight + k) : a * g;
      });
      float inverse = 1.0f / __builtin_sqrtf(sum(square) / float(n) + eps);
      vf r = splat(inverse), shrink = splat(inverse * inverse * sum(dot) / float(n));
      for_chunks(n, [&](long k, auto chunk) {
        vf a = chunk.load(from + k), g = chunk.load(grad + k), w = splat(1.0f);
        if (weight) {
          w = chunk.load(weight + k);
          chunk.store(mine + k, chunk.load(mine + k) + g * a * r);
        }
        chunk.store(dx + i * n + k, r * (g * w - a * shrink));
      });
    }
  }
  for (long k = 0; weight && k < n; ++k) {
    dweight[k] = partial[0][k];
    for (int other = 1; other < threads; ++other) dweight[k] += partial[other][k];
  }
}

// a = silu(min(gate, limit)) * clamp(up, +-limit) * weight; weight [rows] may be null.
template <typename T>
void swiglu(const T* gate, const T* up, const float* weight, float limit, long rows, long n, T* a,
            int threads) {
  vf high = splat(limit), low = splat(-limit);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long i = 0; i < rows; ++i) {
    vf w = splat(weight ? weight[i] : 1.0f);
    for_chunks(n, [&](long k, auto chunk) {
      vf g = chunk.load(gate + i * n + k), v = chunk.load(up + i * n + k);
      g = g > high ? high : g;
      v = v > high ? high : v < low ? low : v;
      chunk.store(a + i * n + k, g * sigmoid(g) * v * w);
    });
  }
}

template <typename T>
void swiglu_backward(const T* gate, const T* up, const float* weight, const T* da, float limit,
                     long rows, long n, T* dgate, T* dup, float* dweight, int threads) {
  vf high = splat(limit), low = splat(-limit);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long i = 0; i < rows; ++i) {
    vf w = splat(weight ? weight[i] : 1.0f), to_weight = {};
    for_chunks(n, [&](long k, auto chunk) {
      vf g = chunk.load(gate + i * n + k), v = chunk.load(up + i * n + k);
      vf d = chunk.load(da + i * n + k);
      auto gate_passes = g <= high;
      auto up_passes = (v <= high) & (v >= low);
      g = g > high ? high : g;
      v = v > high ? high : v < low ? low : v;
      vf s = sigmoid(g), silu = g * s;
      to_weight += d * silu * v;
      d *= w;
      vf to_gate = d * v * s * (1.0f + g * (1.0f - s)), to_up = d * silu;
      chunk.store(dgate + i * n + k, gate_passes ? to_gate : vf{});
      chunk.store(dup + i * n + k, up_passes ? to_up : vf{});
    });
    if (weight) dweight[i] = sum(to_weight);
  }
}

template <int... I>
INLINE vf swap_pairs(vf a, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, (vi){(I ^ 1)...});
}

// Rotates the last 2 * pairs of `channels` by +angle or -angle; one angle row a token, shared by heads.
template <typename T>
void rope(const T* x, const float* cosine, const float* sine, float sign, long tokens, long heads,
          long channels, long pairs, T* y, int threads) {
  long plain = channels - 2 * pairs;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long t = 0; t < tokens; ++t) {
    float c[PAIR_BUFFER], s[PAIR_BUFFER];
    for (long p = 0; p < pairs; ++p) {
      c[2 * p] = c[2 * p + 1] = cosine[t * pairs + p];
      s[2 * p + 1] = sign * sine[t * pairs + p];
      s[2 * p] = -s[2 * p + 1];
    }
    for (long h = 0; h < heads; ++h) {
      long row = (t * heads + h) * channels;
      memcpy(y + row, x + row, plain * sizeof(T));
      row += plain;
      for_chunks(2 * pairs, [&](long k, auto chunk) {
        vf a = chunk.load(x + row + k);
        vf turned = swap_pairs(a, std::make_integer_sequence<int, LANES>{});
        chunk.store(y + row + k, a * chunk.load(c + k) + turned * chunk.load(s + k));
      });
    }
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                            \
  extern "C" void rms_norm_##NAME(const T* x, const float* weight, float eps, long rows, long n,   \
                                  T* y, int threads) {                                             \
    rms_norm(x, weight, eps, rows, n, y, threads);                                                 \
  }                                                                                                \
  extern "C" void rms_norm_backward_##NAME(const T* x, const float* weight, const T* dy,           \
                                           float eps, long rows, long n, T* dx, float* dweight,    \
                                           int threads) {                                          \
    rms_norm_backward(x, weight, dy, eps, rows, n, dx, dweight, threads);                          \
  }                                                                                                \
  extern "C" void swiglu_##NAME(const T* gate, const T* up, const float* weight, float limit,      \
                                long rows, long n, T* a, int threads) {                            \
    swiglu(gate, up, weight, limit, rows, n, a, threads);                                          \
  }                                                                                                \
  extern "C" void swiglu_backward_##NAME(const T* gate, const T* up, const float* weight,          \
                                         const T* da, float limit, long rows, long n, T* dgate,    \
                                         T* dup, float* dweight, int threads) {                    \
    swiglu_backward(gate, up, weight, da, limit, rows, n, dgate, dup, dweight, threads);           \
  }                                                                                                \
  extern "C" void rope_##NAME(const T* x, const float* cosine, const float* sine, float sign,      \
                              long tokens, long heads, long channels, long pairs, T* y,            \
                              int threads) {                                                       \
    rope(x, cosine, sine, sign, tokens, heads, channels, pairs, y, threads);                       \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
