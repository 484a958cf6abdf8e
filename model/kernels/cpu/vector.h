// Vectors of LANES floats, bf16 rows, exp and sums: what the CPU kernels share. Plain GCC vector
// extensions, no intrinsics: the compiler maps them to whatever -march=native offers.
// Every reduction has one fixed order, so results do not depend on the run.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define UNROLL _Pragma("GCC unroll 16")

namespace {

typedef uint16_t bf16;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline vf splat(float a) { return a - vf{}; }

inline vf load(const float* p) { return *(const vf_unaligned*)p; }
inline vf load(const bf16* p) {
  vh half = *(const vh_unaligned*)p;
  return (vf)(__builtin_convertvector(half, vu) << 16);
}

inline void store(float* p, vf a) { *(vf_unaligned*)p = a; }
inline void store(bf16* p, vf a) {  // round to nearest even; a NaN stays one
  vu bits = (vu)a;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = (a == a) ? rounded : (bits >> 16) | 0x40;
  *(vh_unaligned*)p = __builtin_convertvector(rounded, vh);
}

// The last n < LANES elements of a row; the others read as zero.
template <typename T>
inline vf load_part(const T* p, long n) {
  T part[LANES] = {};
  memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <typename T>
inline void store_part(T* p, vf a, long n) {
  T part[LANES];
  store(part, a);
  memcpy(p, part, n * sizeof(T));
}

// fp32 copy of a row, filled up with zeros to `padded` elements (a multiple of LANES).
template <typename T>
inline void load_row(float* to, const T* from, long n, long padded) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  if (i < n) store(to + i, load_part(from + i, n - i)), i += LANES;
  for (; i < padded; i += LANES) store(to + i, vf{});
}
template <typename T>
inline void store_row(T* to, const float* from, long n) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load(from + i), n - i);
}

// Sum of all lanes, by halves.
template <int N>
inline float sum_of(const float* p) {
  typedef float half __attribute__((vector_size(2 * N)));
  half low, high;
  memcpy(&low, p, sizeof(half));
  memcpy(&high, p + N / 2, sizeof(half));
  low += high;
  return sum_of<N / 2>((const float*)&low);
}
template <>
inline float sum_of<2>(const float* p) {
  return p[0] + p[1];
}
inline float sum(vf a) { return sum_of<LANES>((const float*)&a); }

inline vf max(vf a, vf b) { return a > b ? a : b; }

// e^a to about 1 ulp; below -87 it stops at 1.6e-38, above 88 at 1.7e38; a NaN stays one.
inline vf exp(vf a) {
  a = a < splat(-87.0f) ? splat(-87.0f) : a;
  a = a > splat(88.0f) ? splat(88.0f) : a;
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
  vi exponent = ((vi)shifted - (vi)magic) << 23;
  return (vf)((vi)p + exponent);
}

inline vf sigmoid(vf a) { return 1.0f / (1.0f + exp(-a)); }

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }

// A 64-byte aligned buffer of floats, uninitialised.
struct Buffer {
  float* p;
  explicit Buffer(long n) : p((float*)aligned_alloc(64, round_up(n * 4 + 64, 64))) {}
  ~Buffer() { free(p); }
  Buffer(const Buffer&) = delete;
};

}  // namespace
