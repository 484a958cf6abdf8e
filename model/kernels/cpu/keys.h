// Tables of keys, and the three products every kernel over keys is made of: scores (dots), weighted sums
// of keys (mix), and sums into keys (spread). All fp32.
//
// Keys lie twice: as rows [key][K], and in tiles of LANES keys [K][LANES], so that scores come out a
// vector of keys at a time and weighted sums a vector of channels at a time. K is a multiple of LANES.
#pragma once

#include "vector.h"

namespace {

// Rows and tiles of a table of keys, fp32; one per batch row.
struct Table {
  long count, tiles, K;
  Buffer rows, packed;
  Table(long count, long K)
      : count(count),
        tiles((count + LANES - 1) / LANES),
        K(K),
        rows(tiles * LANES * K),
        packed(tiles * LANES * K) {}
};

void pack_tile(float* tile, const float* rows, long K) {
  for (long j = 0; j < LANES; ++j)
    for (long k = 0; k < K; ++k) tile[k * LANES + j] = rows[j * K + k];
}

template <typename T>
void fill_table(Table& table, const T* from) {
  const long K = table.K;
#pragma omp for schedule(static)
  for (long tile = 0; tile < table.tiles; ++tile) {
    float* rows = table.rows.p + tile * LANES * K;
    for (long j = 0; j < LANES; ++j) {
      long key = tile * LANES + j;
      if (key < table.count)
        load_row(rows + j * K, from + key * K, K, K);
      else
        memset(rows + j * K, 0, K * sizeof(float));
    }
    pack_tile(table.packed.p + tile * LANES * K, rows, K);
  }
}

// Keys of one query from one source: whole tiles, of which lanes [low, high) count.
struct Segment {
  const float *rows, *packed;
  float* grad;  // gradient rows; backward only
  long tiles, low, high;
  long offset;  // of its first key in the query's score rows
};

Segment range_of(const Table& table, float* grad, long first, long stop) {
  long base = first / LANES;
  Segment s;
  s.rows = table.rows.p + base * LANES * table.K;
  s.packed = table.packed.p + base * LANES * table.K;
  s.grad = grad ? grad + base * LANES * table.K : nullptr;
  s.tiles = (stop - base * LANES + LANES - 1) / LANES;
  s.low = first - base * LANES;
  s.high = stop - base * LANES;
  return s;
}

// out[h][j] = <x[h], key j> for NH heads and NT tiles
template <int NH, int NT>
INLINE void dots(float* out, long stride, const float* x, const float* packed, long K) {
  vf acc[NH][NT] = {};
  for (long k = 0; k < K; ++k) {
    vf keys[NT];
    repeat<NT>([&](auto n) { keys[n] = load(packed + (n * K + k) * LANES); });
    repeat<NH>([&](auto h) {
      vf value = splat(x[h * K + k]);
      repeat<NT>([&](auto n) { acc[h][n] += value * keys[n]; });
    });
  }
  repeat<NH>([&](auto h) {
    repeat<NT>([&](auto n) { store(out + h * stride + n * LANES, acc[h][n]); });
  });
}

template <int NH>
void dots_heads(float* out, long stride, const float* x, const Segment& s, long K) {
  long n = 0;
  for (; n + 4 <= s.tiles; n += 4) dots<NH, 4>(out + n * LANES, stride, x, s.packed + n * K * LANES, K);
  for (; n < s.tiles; ++n) dots<NH, 1>(out + n * LANES, stride, x, s.packed + n * K * LANES, K);
}

// out[h][j] = <x[h], key j> for all heads and keys of a segment
void score(float* out, long stride, const float* x, const Segment& s, long H, long K) {
  long h = 0;
  for (; h + 4 <= H; h += 4) dots_heads<4>(out + h * stride + s.offset, stride, x + h * K, s, K);
  for (; h < H; ++h) dots_heads<1>(out + h * stride + s.offset, stride, x + h * K, s, K);
}

// o[h] += sum_j p[h][j] row j, for NH heads and NK vectors of channels
template <int NH, int NK>
INLINE void mix_block(float* o, const float* p, long stride, const float* rows, long low, long high, long K) {
  vf acc[NH][NK];
  repeat<NH>([&](auto h) { repeat<NK>([&](auto k) { acc[h][k] = load(o + h * K + k * LANES); }); });
  for (long j = low; j < high; ++j) {
    vf row[NK];
    repeat<NK>([&](auto k) { row[k] = load(rows + j * K + k * LANES); });
    repeat<NH>([&](auto h) {
      vf weight = splat(p[h * stride + j]);
      repeat<NK>([&](auto k) { acc[h][k] += weight * row[k]; });
    });
  }
  repeat<NH>([&](auto h) { repeat<NK>([&](auto k) { store(o + h * K + k * LANES, acc[h][k]); }); });
}

template <int NH>
void mix_heads(float* o, const float* p, long stride, const Segment& s, long K) {
  long k = 0;
  for (; k + 4 * LANES <= K; k += 4 * LANES)
    mix_block<NH, 4>(o + k, p, stride, s.rows + k, s.low, s.high, K);
  for (; k < K; k += LANES) mix_block<NH, 1>(o + k, p, stride, s.rows + k, s.low, s.high, K);
}

void mix(float* o, const float* p, long stride, const Segment& s, long H, long K) {
  long h = 0;
  for (; h + 4 <= H; h += 4) mix_heads<4>(o + h * K, p + h * stride + s.offset, stride, s, K);
  for (; h < H; ++h) mix_heads<1>(o + h * K, p + h * stride + s.offset, stride, s, K);
}

// grad[j] += sum_h a[h][j] x[h] (+ b[h][j] y[h] if TWO), for NJ keys and NK vectors of channels
template <bool TWO, int NJ, int NK>
INLINE void spread_block(float* grad, const float* a, const float* b, long stride, const float* x,
                         const float* y, long H, long K) {
  vf acc[NJ][NK];
  repeat<NJ>([&](auto j) { repeat<NK>([&](auto k) { acc[j][k] = load(grad + j * K + k * LANES); }); });
  for (long h = 0; h < H; ++h) {
    vf xs[NK], ys[NK];
    repeat<NK>([&](auto k) {
      xs[k] = load(x + h * K + k * LANES);
      if (TWO) ys[k] = load(y + h * K + k * LANES);
    });
    repeat<NJ>([&](auto j) {
      vf wa = splat(a[h * stride + j]);
      repeat<NK>([&](auto k) { acc[j][k] += wa * xs[k]; });
      if (TWO) {
        vf wb = splat(b[h * stride + j]);
        repeat<NK>([&](auto k) { acc[j][k] += wb * ys[k]; });
      }
    });
  }
  repeat<NJ>([&](auto j) { repeat<NK>([&](auto k) { store(grad + j * K + k * LANES, acc[j][k]); }); });
}

template <bool TWO, int NK>
void spread_keys(float* grad, const float* a, const float* b, long stride, const float* x, const float* y,
                 long low, long high, long H, long K) {
  long j = low;
  for (; j + 4 <= high; j += 4)
    spread_block<TWO, 4, NK>(grad + j * K, a + j, b + j, stride, x, y, H, K);
  for (; j < high; ++j) spread_block<TWO, 1, NK>(grad + j * K, a + j, b + j, stride, x, y, H, K);
}

template <bool TWO>
void spread(const Segment& s, const float* a, const float* b, long stride, const float* x, const float* y,
            long H, long K) {
  long k = 0;
  for (; k + 4 * LANES <= K; k += 4 * LANES)
    spread_keys<TWO, 4>(s.grad + k, a + s.offset, b + s.offset, stride, x + k, y + k, s.low, s.high, H, K);
  for (; k < K; k += LANES)
    spread_keys<TWO, 1>(s.grad + k, a + s.offset, b + s.offset, stride, x + k, y + k, s.low, s.high, H, K);
}

constexpr long CHUNK = 32;  // queries a part takes at a time

// f(t) for the queries of one part: the chunks are dealt to the parts in turn.
template <typename F>
INLINE void for_queries(long T, int part, int parts, F&& f) {
  for (long c = part; c * CHUNK < T; c += parts)
    for (long t = c * CHUNK; t < T && t < (c + 1) * CHUNK; ++t) f(t);
}

// to = sum over parts, in their order
void add_up(float* to, const Parts& parts, long n, int count) {
#pragma omp for schedule(static)
  for (long i = 0; i < n; ++i) {
    float total = parts[0][i];
    for (int m = 1; m < count; ++m) total += parts[m][i];
    to[i] = total;
  }
}

}  // namespace
