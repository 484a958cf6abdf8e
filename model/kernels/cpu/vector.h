// Vectors of LANES floats, bf16 rows, exp and sums: what the CPU kernels share. GCC vector extensions,
// which the compiler maps to whatever -march=native offers; intrinsics only to widen and narrow
// 16-bit lanes, where it needs five instructions for one.
// Every reduction has one fixed order, so results do not depend on the run, nor on how many threads
// OpenMP really grants (Parts).
//
// A NaN goes through every function here, and so do infinities: `a > b ? a : b` would drop a NaN.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

// f(0), f(1), ... f(N - 1), spelled out before the optimiser runs: arrays of vectors that are indexed
// by the loop variable only then live in registers.
template <int N, typename F, int... I>
INLINE void repeat_each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
INLINE void repeat(F&& f) {
  repeat_each<N>(f, std::make_integer_sequence<int, N>{});
}

typedef uint16_t bf16;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

INLINE vf splat(float a) { return a - vf{}; }

INLINE vu widen(const bf16* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  return __builtin_convertvector((vh)*(const vh_unaligned*)p, vu);
#endif
}
INLINE void narrow(bf16* p, vu a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)a));
#else
  *(vh_unaligned*)p = __builtin_convertvector(a, vh);
#endif
}

INLINE vf load(const float* p) { return *(const vf_unaligned*)p; }
INLINE vf load(const bf16* p) { return (vf)(widen(p) << 16); }

INLINE void store(float* p, vf a) { *(vf_unaligned*)p = a; }
INLINE void store(bf16* p, vf a) {  // round to nearest even; a NaN stays one
  vu bits = (vu)a;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  narrow(p, (a == a) ? rounded : (bits >> 16) | 0x40);
}

// Walks a row of n elements: f(i, chunk) with i = 0, LANES, ...; the chunk loads and stores LANES
// elements, or what is left of the row at its end (the rest reads as zero).
struct WholeChunk {
  template <typename T>
  INLINE vf load(const T* p) const {
    return ::load(p);
  }
  template <typename T>
  INLINE void store(T* p, vf a) const {
    ::store(p, a);
  }
};
struct LastChunk {
  long n;
  template <typename T>
  INLINE vf load(const T* p) const {
    T part[LANES] = {};
    memcpy(part, p, n * sizeof(T));
    return ::load(part);
  }
  template <typename T>
  INLINE void store(T* p, vf a) const {
    T part[LANES];
    ::store(part, a);
    memcpy(p, part, n * sizeof(T));
  }
};
template <typename F>
INLINE void for_chunks(long n, F&& f) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) f(i, WholeChunk{});
  if (i < n) f(i, LastChunk{n - i});
}

// fp32 copy of a row, filled up with zeros to `padded` elements (a multiple of LANES).
template <typename T>
inline void load_row(float* to, const T* from, long n, long padded) {
  for_chunks(n, [&](long i, auto chunk) { store(to + i, chunk.load(from + i)); });
  for (long i = round_up(n, LANES); i < padded; i += LANES) store(to + i, vf{});
}
template <typename T>
inline void store_row(T* to, const float* from, long n) {
  for_chunks(n, [&](long i, auto chunk) { chunk.store(to + i, load(from + i)); });
}

// Sum of all lanes, by halves.
template <int... I>
INLINE vf add_halves(vf a, int half, std::integer_sequence<int, I...>) {
  for (; half; half /= 2) a += __builtin_shuffle(a, (vi){(I ^ half)...});
  return a;
}
INLINE float sum(vf a) {
  return add_halves(a, LANES / 2, std::make_integer_sequence<int, LANES>{})[0];
}

// The larger one, NaN where either is; relu.
INLINE vf max(vf a, vf b) { return a > b ? a : a == a ? b : a; }
INLINE float max(float a, float b) { return a > b || a != a ? a : b; }
INLINE vf relu(vf a) { return a < vf{} ? vf{} : a; }

// e^a to about 1 ulp; 0 where it would be subnormal, inf above the largest float; a NaN stays one,
// whatever its bits. Lanes out of range hold garbage until the selections at the end.
INLINE vf exp(vf a) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = a * 1.44269504f + magic;
  vf n = shifted - magic;
  vf r = a - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vu exponent = ((vu)shifted - (vu)magic) << 23;
  vf y = (vf)((vu)p + exponent);
  y = a < splat(-87.3365f) ? vf{} : y;
  y = a > splat(88.7228f) ? splat(__builtin_inff()) : y;
  return a == a ? y : a;
}

INLINE vf sigmoid(vf a) { return 1.0f / (1.0f + exp(-a)); }

// A 64-byte aligned buffer of floats, uninitialised.
struct Buffer {
  float* p;
  explicit Buffer(long n) : p((float*)aligned_alloc(64, round_up(n * 4 + 64, 64))) {}
  ~Buffer() { free(p); }
  Buffer(const Buffer&) = delete;
};

// Room for sums over tokens: `size` floats a part. A kernel always splits its work into as many parts
// as threads were asked for and adds them up in their order. OpenMP may give fewer threads
// (OMP_THREAD_LIMIT, OMP_DYNAMIC, a call inside another team): then a thread runs several parts, and
// nothing else changes, not even a bit. So no kernel may ask who or how many the threads are.
struct Parts {
  const long size;
  Buffer all;
  Parts(int count, long size) : size(size), all(count * size) {}
  float* operator[](int part) const { return all.p + part * size; }
  float* zeroed(int part) const {
    memset((*this)[part], 0, size * sizeof(float));
    return (*this)[part];
  }
};

}  // namespace
