// mHC (reference B.2) on CPU: one pass over the streams per call. Built once per number of streams
// (-DSTREAMS=4). Work is split into contiguous parts of tiles of TILE tokens; a token's result does not
// depend on the others, sums over tokens are taken over each part and then over the parts.
//
// In a tile the streams lie as fp32 rows [token][stream][hidden, padded with zeros]; the mix
// channels lie [channel][token], so that sigmoid and Sinkhorn work on LANES tokens at once.
#include "vector.h"

namespace {

constexpr int S = STREAMS;
constexpr int MIX = (2 + S) * S;
constexpr int TILE = 16;
constexpr int STEP = 2 * LANES;               // hidden is padded to a multiple of it
constexpr int GROUP = LANES == 16 ? 4 : 2;    // tokens per register block
constexpr long SKEW = 16;                     // rows of 4096 bytes would share cache sets

static_assert(TILE % LANES == 0 && TILE % GROUP == 0);

constexpr int divisor(int n, int at_most) {
  while (n % at_most) --at_most;
  return at_most;
}

struct Shape {
  long tokens, hidden, padded, stride;  // stride: one token's streams, or one row of fn
  Shape(long tokens, long hidden)
      : tokens(tokens), hidden(hidden), padded(round_up(hidden, STEP)), stride(S * padded + SKEW) {}
  long tiles() const { return (tokens + TILE - 1) / TILE; }
  long width() const { return S * padded; }
};

struct Tile {
  long first, count;  // tokens of this tile
  Tile(const Shape& s, long index)
      : first(index * TILE), count(s.tokens - first < TILE ? s.tokens - first : TILE) {}
};

typedef float Channels[MIX][TILE] __attribute__((aligned(64)));

template <typename T>
void load_tokens(float* to, long stride, const T* from, const Shape& s, Tile tile, int rows) {
  for (long t = 0; t < TILE; ++t)
    for (int j = 0; j < rows; ++j) {
      float* row = to + t * stride + j * s.padded;
      if (t < tile.count)
        load_row(row, from + ((tile.first + t) * rows + j) * s.hidden, s.hidden, s.padded);
      else
        memset(row, 0, s.padded * sizeof(float));
    }
}

void pack_rows(float* to, const float* from, const Shape& s, int rows) {
#pragma omp for schedule(static)
  for (int m = 0; m < rows; ++m)
    for (int j = 0; j < S; ++j)
      load_row(to + m * s.stride + j * s.padded, from + (m * S + j) * s.hidden, s.hidden, s.padded);
}

// Asks for a cache line that the next tile will read. The arithmetic of a tile takes longer than its
// memory traffic; without this the two would alternate.
template <typename T>
INLINE void ask(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// out[t][m] = lane sums of <x[t], fn[m]> for a block of tokens and rows held in registers.
template <int ROWS, typename T>
__attribute__((noinline)) void dots(float (*out)[ROWS][LANES], const float* x, const float* fn,
                                    long stride, long width, const T* ahead) {
  vf acc[GROUP][ROWS] = {};
  for (long k = 0; k < width; k += LANES) {
    vf xs[GROUP];
    ask(ahead + k);
    repeat<GROUP>([&](auto t) { xs[t] = load(x + t * stride + k); });
    repeat<ROWS>([&](auto m) {
      vf f = load(fn + m * stride + k);
      repeat<GROUP>([&](auto t) { acc[t][m] += xs[t] * f; });
    });
  }
  repeat<GROUP>([&](auto t) { repeat<ROWS>([&](auto m) { store(out[t][m], acc[t][m]); }); });
}

// mix[m][t] = <x[t], fn[m]>; ahead: the streams of the next tile.
template <int M, typename T>
void project(Channels& mix, const float* x, const float* fn, const Shape& s, const T* ahead) {
  constexpr int ROWS = divisor(M, 6);
  float lanes[GROUP][ROWS][LANES];
  long row = 0;
  for (int m0 = 0; m0 < M; m0 += ROWS)
    for (int t0 = 0; t0 < TILE; t0 += GROUP) {
      dots<ROWS>(lanes, x + t0 * s.stride, fn + m0 * s.stride, s.stride, s.width(),
                 ahead + row++ % TILE * S * s.hidden);
      for (int m = 0; m < ROWS; ++m)
        for (int t = 0; t < GROUP; ++t) mix[m0 + m][t0 + t] = sum(load(lanes[t][m]));
    }
}

void inverse_rms(float* rms, const float* x, const Shape& s, float rms_eps) {
  for (int t = 0; t < TILE; ++t) {
    vf acc0 = {}, acc1 = {};
    for (long k = 0; k < s.width(); k += STEP) {
      vf a = load(x + t * s.stride + k), b = load(x + t * s.stride + k + LANES);
      acc0 += a * a, acc1 += b * b;
    }
    rms[t] = 1.0f / __builtin_sqrtf(sum(acc0 + acc1) / float(S * s.hidden) + rms_eps);
  }
}

// One Sinkhorn run over LANES tokens. `tape`, if given, keeps what the backward pass needs:
// softmax, then for each half step its output and the inverse of its divisor.
struct Sinkhorn {
  static constexpr int HALF = S * S + S;
  static long tape_size(int iters) { return S * S + 2 * iters * HALF; }

  vf c[S][S];

  void softmax(vf* tape, vf eps) {
    for (int j = 0; j < S; ++j) {
      vf top = c[j][0];
      for (int k = 1; k < S; ++k) top = max(top, c[j][k]);
      vf total = {};
      for (int k = 0; k < S; ++k) c[j][k] = exp(c[j][k] - top), total += c[j][k];
      for (int k = 0; k < S; ++k) {
        c[j][k] /= total;
        if (tape) tape[j * S + k] = c[j][k];
        c[j][k] += eps;
      }
    }
  }
  template <bool COLUMNS>
  void half_step(vf* tape, vf eps) {
    repeat<S>([&](auto a) {
      vf total = eps;
      repeat<S>([&](auto b) { total += COLUMNS ? c[b][a] : c[a][b]; });
      vf inverse = 1.0f / total;
      repeat<S>([&](auto b) { (COLUMNS ? c[b][a] : c[a][b]) *= inverse; });
      if (tape) tape[S * S + a] = inverse;
    });
    if (tape) memcpy(tape, c, sizeof(c));
  }
  void run(int iters, float eps, vf* tape) {
    vf e = splat(eps);
    softmax(tape, e);
    for (int i = 0; i < iters; ++i) {
      if (i) half_step<false>(tape ? tape + S * S + (2 * i) * HALF : nullptr, e);
      half_step<true>(tape ? tape + S * S + (2 * i + 1) * HALF : nullptr, e);
    }
  }

  // c holds the gradient of the output; it becomes that of the logits.
  template <bool COLUMNS>
  void half_step_backward(const vf* tape) {
    repeat<S>([&](auto a) {
      vf dot = {};
      repeat<S>([&](auto b) {
        dot += COLUMNS ? c[b][a] * tape[b * S + a] : c[a][b] * tape[a * S + b];
      });
      repeat<S>([&](auto b) {
        vf& g = COLUMNS ? c[b][a] : c[a][b];
        g = (g - dot) * tape[S * S + a];
      });
    });
  }
  void backward(int iters, const vf* tape) {
    for (int i = iters - 1; i >= 0; --i) {
      half_step_backward<true>(tape + S * S + (2 * i + 1) * HALF);
      if (i) half_step_backward<false>(tape + S * S + (2 * i) * HALF);
    }
    for (int j = 0; j < S; ++j) {
      vf dot = {};
      for (int k = 0; k < S; ++k) dot += c[j][k] * tape[j * S + k];
      for (int k = 0; k < S; ++k) c[j][k] = (c[j][k] - dot) * tape[j * S + k];
    }
  }
};

struct Gates {  // base [M], scale [3] (head: [1]) and the constants
  const float *base, *scale;
  int iters;
  float eps, rms_eps;
  vf logit(const Channels& mix, int m, int v) const {
    return load(&mix[m][v]) * scale[m < S ? 0 : m < 2 * S ? 1 : 2] + base[m];
  }
};

// Turns the mix channels of a tile into pre, post and comb (pre only for the head).
template <bool HEAD>
void weights(Channels& w, const Channels& mix, const Gates& gates) {
  for (int v = 0; v < TILE; v += LANES) {
    for (int j = 0; j < S; ++j) store(&w[j][v], sigmoid(gates.logit(mix, j, v)) + gates.eps);
    if (HEAD) continue;
    for (int k = S; k < 2 * S; ++k) store(&w[k][v], 2.0f * sigmoid(gates.logit(mix, k, v)));
    Sinkhorn sinkhorn;
    for (int m = 0; m < S * S; ++m) sinkhorn.c[m / S][m % S] = gates.logit(mix, 2 * S + m, v);
    sinkhorn.run(gates.iters, gates.eps, nullptr);
    for (int m = 0; m < S * S; ++m) store(&w[2 * S + m][v], sinkhorn.c[m / S][m % S]);
  }
}

// u[t] = sum_j pre[j][t] x[t][j]
template <typename T>
void collapse(T* u, const Channels& w, const float* x, const Shape& s, Tile tile) {
  for (long t = 0; t < tile.count; ++t) {
    T* to = u + (tile.first + t) * s.hidden;
    for_chunks(s.hidden, [&](long d, auto chunk) {
      vf acc = {};
      repeat<S>([&](auto j) { acc += w[j][t] * load(x + t * s.stride + j * s.padded + d); });
      chunk.store(to + d, acc);
    });
  }
}

// Between the tile's [channel][token] and rows of `count` channels per token outside.
void write_channels(float* rows, const Channels& from, int first, int count, Tile tile) {
  for (long t = 0; t < tile.count; ++t)
    for (int m = 0; m < count; ++m) rows[(tile.first + t) * count + m] = from[first + m][t];
}
void add_channels(Channels& to, const float* rows, int first, int count, Tile tile) {
  for (long t = 0; t < tile.count; ++t)
    for (int m = 0; m < count; ++m) to[first + m][t] += rows[(tile.first + t) * count + m];
}

// Forward of pre and of the head; mix and rms are kept for the backward pass.
template <typename T, bool HEAD>
void pre(const T* x, const float* fn, Gates gates, Shape s, T* u, float* post, float* comb,
         float* mix_out, float* rms_out, int threads) {
  constexpr int M = HEAD ? S : MIX;
  Buffer packed(M * s.stride);
#pragma omp parallel num_threads(threads)
  {
    pack_rows(packed.p, fn, s, M);
    Buffer streams(TILE * s.stride);
    Channels mix, w;
#pragma omp for schedule(static)
    for (long i = 0; i < s.tiles(); ++i) {
      Tile tile(s, i);
      float rms[TILE];
      load_tokens(streams.p, s.stride, x, s, tile, S);
      inverse_rms(rms, streams.p, s, gates.rms_eps);
      project<M>(mix, streams.p, packed.p, s, x + (tile.first + TILE) * S * s.hidden);
      for (int m = 0; m < M; ++m)
        for (int t = 0; t < TILE; ++t) mix[m][t] *= rms[t];
      weights<HEAD>(w, mix, gates);
      collapse(u, w, streams.p, s, tile);
      memcpy(rms_out + tile.first, rms, tile.count * sizeof(float));
      write_channels(mix_out, mix, 0, M, tile);
      if (HEAD) continue;
      write_channels(post, w, S, S, tile);
      write_channels(comb, w, 2 * S, S * S, tile);
    }
  }
}

// Gradients of pre and comb: dw[j] = <du, x_j>, dw[2S + jS + k] = <x_j, dnew_k>.
template <bool HEAD>
void weight_gradients(Channels& dw, const float* x, const float* dnew, const float* du,
                      const Shape& s) {
  for (int t = 0; t < TILE; ++t)
    for (int j = 0; j < S; ++j) {
      const float* xj = x + t * s.stride + j * s.padded;
      vf to_pre = {}, to_comb[S] = {};
      for (long d = 0; d < s.padded; d += LANES) {
        vf a = load(xj + d);
        to_pre += a * load(du + t * (s.padded + SKEW) + d);
        if (HEAD) continue;
        repeat<S>([&](auto k) {
          to_comb[k] += a * load(dnew + t * s.stride + k * s.padded + d);
        });
      }
      dw[j][t] = sum(to_pre);
      if (HEAD) continue;
      repeat<S>([&](auto k) { dw[2 * S + j * S + k][t] = sum(to_comb[k]); });
    }
}

// Through the activations: dw (gradient of the weights) becomes that of their logits; w is filled.
template <bool HEAD>
void logit_gradients(Channels& dw, Channels& w, const Channels& mix, const Gates& gates, vf* tape) {
  for (int v = 0; v < TILE; v += LANES) {
    for (int m = 0; m < (HEAD ? S : 2 * S); ++m) {
      vf y = sigmoid(gates.logit(mix, m, v));
      store(&w[m][v], m < S ? y + gates.eps : 2.0f * y);
      store(&dw[m][v], load(&dw[m][v]) * y * (1.0f - y) * (m < S ? 1.0f : 2.0f));
    }
    if (HEAD) continue;
    Sinkhorn sinkhorn;
    for (int m = 0; m < S * S; ++m) sinkhorn.c[m / S][m % S] = gates.logit(mix, 2 * S + m, v);
    sinkhorn.run(gates.iters, gates.eps, tape);
    for (int m = 0; m < S * S; ++m) {
      store(&w[2 * S + m][v], sinkhorn.c[m / S][m % S]);
      sinkhorn.c[m / S][m % S] = load(&dw[2 * S + m][v]);
    }
    sinkhorn.backward(gates.iters, tape);
    for (int m = 0; m < S * S; ++m) store(&dw[2 * S + m][v], sinkhorn.c[m / S][m % S]);
  }
}

// dfn[m] += sum_t dp[m][t] x[t]; ahead: the streams of the next tile.
template <int M, typename T>
void accumulate_dfn(float* dfn, const Channels& dp, const float* x, const Shape& s,
                    const T* ahead) {
  constexpr int ROWS = divisor(M, LANES == 16 ? 12 : 6);
  for (long k = 0; k < s.width(); k += STEP)
    for (int m0 = 0; m0 < M; m0 += ROWS) {
      vf acc[ROWS][2];
      float* to = dfn + m0 * s.stride + k;
      repeat<ROWS>([&](auto m) {
        repeat<2>([&](auto h) { acc[m][h] = load(to + m * s.stride + h * LANES); });
      });
      for (int t = 0; t < TILE; ++t) {
        vf a = load(x + t * s.stride + k), b = load(x + t * s.stride + k + LANES);
        ask(ahead + t * S * s.hidden + k + (m0 ? LANES : 0));
        repeat<ROWS>([&](auto m) {
          acc[m][0] += dp[m0 + m][t] * a, acc[m][1] += dp[m0 + m][t] * b;
        });
      }
      repeat<ROWS>([&](auto m) {
        repeat<2>([&](auto h) { store(to + m * s.stride + h * LANES, acc[m][h]); });
      });
    }
}

// x becomes its own gradient: pre_j du + sum_k C_jk dnew_k + sum_m dp_m fn_m - shrink x.
// ahead: dnew of the next tile.
template <int M, bool HEAD, typename T>
void stream_gradients(float* x, const float* dnew, const float* du, const float* fn,
                      const Channels& w, const Channels& dp, const float* shrink, const Shape& s,
                      const T* ahead) {
  for (int t0 = 0; t0 < TILE; t0 += GROUP)
    for (int j = 0; j < S; ++j)
      for (long d = 0; d < s.padded; d += STEP) {
        long k = j * s.padded + d;
        vf acc[GROUP][2];
        repeat<GROUP>([&](auto t) {
          repeat<2>([&](auto h) {
            long at = d + h * LANES;
            float* xt = x + (t0 + t) * s.stride;
            vf a = w[j][t0 + t] * load(du + (t0 + t) * (s.padded + SKEW) + at);
            a -= shrink[t0 + t] * load(xt + k + h * LANES);
            if (!HEAD) repeat<S>([&](auto n) {
              a += w[2 * S + j * S + n][t0 + t] *
                   load(dnew + (t0 + t) * s.stride + n * s.padded + at);
            });
            acc[t][h] = a;
            if (!HEAD) ask(ahead + ((t0 + t) * S + j) * s.hidden + at);
          });
        });
        for (int m = 0; m < M; ++m) {
          vf f0 = load(fn + m * s.stride + k), f1 = load(fn + m * s.stride + k + LANES);
          repeat<GROUP>([&](auto t) {
            acc[t][0] += dp[m][t0 + t] * f0, acc[t][1] += dp[m][t0 + t] * f1;
          });
        }
        repeat<GROUP>([&](auto t) {
          repeat<2>([&](auto h) { store(x + (t0 + t) * s.stride + k + h * LANES, acc[t][h]); });
        });
      }
}

// Backward of pre and of the head. dnew is the gradient of the merged streams (comb^T x is
// differentiated here, where x and dnew meet); dpost comes from the merge, dcomb may be null.
template <typename T, bool HEAD>
void pre_backward(const T* x, const float* fn, Gates gates, Shape s, const float* mix_in,
                  const float* rms_in, const T* du, const T* dnew, const float* dpost,
                  const float* dcomb, T* dx, float* dfn, float* dbase, float* dscale, int threads) {
  constexpr int M = HEAD ? S : MIX;
  constexpr int SCALES = HEAD ? 1 : 3;
  Buffer packed(M * s.stride);
  Parts partial_fn(threads, M * s.stride), partial(threads, (M + SCALES) * LANES);
#pragma omp parallel num_threads(threads)
  {
    pack_rows(packed.p, fn, s, M);
    Buffer streams(TILE * s.stride), gradients(HEAD ? 0 : TILE * s.stride);
    Buffer inputs(TILE * (s.padded + SKEW)), tape(Sinkhorn::tape_size(gates.iters) * LANES);
    Channels mix, w, dw;
    auto add_tile = [&](Tile tile, float* my_fn, float* my_sums) {
      load_tokens(streams.p, s.stride, x, s, tile, S);
      load_tokens(inputs.p, s.padded + SKEW, du, s, tile, 1);
      if (!HEAD) load_tokens(gradients.p, s.stride, dnew, s, tile, S);
      memset(mix, 0, sizeof(mix)), memset(dw, 0, sizeof(dw));
      add_channels(mix, mix_in, 0, M, tile);
      weight_gradients<HEAD>(dw, streams.p, gradients.p, inputs.p, s);
      if (!HEAD) add_channels(dw, dpost, S, S, tile);
      if (dcomb) add_channels(dw, dcomb, 2 * S, S * S, tile);
      logit_gradients<HEAD>(dw, w, mix, gates, (vf*)tape.p);
      for (long t = tile.count; t < TILE; ++t)  // an infinite base or scale makes NaN of the padding
        for (int m = 0; m < M; ++m) dw[m][t] = 0;
      float rms[TILE] = {}, shrink[TILE] = {};
      memcpy(rms, rms_in + tile.first, tile.count * sizeof(float));
      for (int m = 0; m < M; ++m) {
        int gate = m < S ? 0 : m < 2 * S ? 1 : 2;
        for (int v = 0; v < TILE; v += LANES) {
          vf g = load(&dw[m][v]), value = load(&mix[m][v]), r = load(rms + v);
          store(my_sums + m * LANES, load(my_sums + m * LANES) + g);
          float* to_scale = my_sums + (M + gate) * LANES;
          store(to_scale, load(to_scale) + g * value);
          g *= gates.scale[gate];
          store(shrink + v, load(shrink + v) + g * value * r * r / float(S * s.hidden));
          store(&dw[m][v], g * r);
        }
      }
      accumulate_dfn<M>(my_fn, dw, streams.p, s, x + (tile.first + TILE) * S * s.hidden);
      stream_gradients<M, HEAD>(streams.p, gradients.p, inputs.p, packed.p, w, dw, shrink, s,
                                dnew + (tile.first + TILE) * S * s.hidden);
      for (long t = 0; t < tile.count; ++t)
        for (int j = 0; j < S; ++j)
          store_row(dx + ((tile.first + t) * S + j) * s.hidden,
                    streams.p + t * s.stride + j * s.padded, s.hidden);
    };
#pragma omp for schedule(static, 1)
    for (int part = 0; part < threads; ++part) {
      float *my_fn = partial_fn.zeroed(part), *my_sums = partial.zeroed(part);
      for (long i = s.tiles() * part / threads; i < s.tiles() * (part + 1) / threads; ++i)
        add_tile(Tile(s, i), my_fn, my_sums);
    }
#pragma omp for schedule(static)
    for (int m = 0; m < M; ++m) {
      float* first = partial_fn[0] + m * s.stride;
      for (int other = 1; other < threads; ++other)
        for (long k = 0; k < s.width(); ++k) first[k] += partial_fn[other][m * s.stride + k];
      for (int j = 0; j < S; ++j)
        memcpy(dfn + (m * S + j) * s.hidden, first + j * s.padded, s.hidden * sizeof(float));
    }
  }
  for (int m = 0; m < M + SCALES; ++m) {
    float total = 0;
    for (int part = 0; part < threads; ++part) total += sum(load(partial[part] + m * LANES));
    (m < M ? dbase[m] : dscale[m - M]) = total;
  }
}

// new_k = post_k y + sum_j C_jk x_j
template <typename T>
void merge(const T* y, const T* x, const float* post, const float* comb, Shape s, T* out,
           int threads) {
  long n = s.hidden;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long t = 0; t < s.tokens; ++t) {
    const T *yt = y + t * n, *xt = x + t * S * n;
    T* to = out + t * S * n;
    vf p[S], c[S][S];
    for (int k = 0; k < S; ++k) p[k] = splat(post[t * S + k]);
    for (int m = 0; m < S * S; ++m) c[m / S][m % S] = splat(comb[t * S * S + m]);
    for_chunks(n, [&](long d, auto chunk) {
      vf in = chunk.load(yt + d), xs[S];
      repeat<S>([&](auto j) { xs[j] = chunk.load(xt + j * n + d); });
      repeat<S>([&](auto k) {
        vf acc = p[k] * in;
        repeat<S>([&](auto j) { acc += c[j][k] * xs[j]; });
        chunk.store(to + k * n + d, acc);
      });
    });
  }
}

// dy = sum_k post_k dnew_k, dpost_k = <dnew_k, y>
template <typename T>
void merge_backward(const T* dnew, const T* y, const float* post, Shape s, T* dy, float* dpost,
                    int threads) {
  long n = s.hidden;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (long t = 0; t < s.tokens; ++t) {
    const T *g = dnew + t * S * n, *yt = y + t * n;
    vf p[S], acc[S] = {};
    for (int k = 0; k < S; ++k) p[k] = splat(post[t * S + k]);
    for_chunks(n, [&](long d, auto chunk) {
      vf in = chunk.load(yt + d), to_y = {};
      repeat<S>([&](auto k) {
        vf gk = chunk.load(g + k * n + d);
        to_y += p[k] * gk;
        acc[k] += gk * in;
      });
      chunk.store(dy + t * n + d, to_y);
    });
    repeat<S>([&](auto k) { dpost[t * S + k] = sum(acc[k]); });
  }
}

}  // namespace

#define EXPORT(T, NAME)                                                                            \
  extern "C" void mhc_pre_##NAME(const T* x, const float* fn, const float* base,                   \
                                 const float* scale, int iters, float eps, float rms_eps,          \
                                 long tokens, long hidden, T* u, float* post, float* comb,         \
                                 float* mix, float* rms, int threads) {                            \
    pre<T, false>(x, fn, {base, scale, iters, eps, rms_eps}, {tokens, hidden}, u, post, comb, mix, \
                  rms, threads);                                                                   \
  }                                                                                                \
  extern "C" void mhc_pre_backward_##NAME(                                                         \
      const T* x, const float* fn, const float* base, const float* scale, int iters, float eps,    \
      long tokens, long hidden, const float* mix, const float* rms, const T* du, const T* dnew,    \
      const float* dpost, const float* dcomb, T* dx, float* dfn, float* dbase, float* dscale,      \
      int threads) {                                                                               \
    pre_backward<T, false>(x, fn, {base, scale, iters, eps, 0}, {tokens, hidden}, mix, rms, du,    \
                           dnew, dpost, dcomb, dx, dfn, dbase, dscale, threads);                   \
  }                                                                                                \
  extern "C" void mhc_head_##NAME(const T* x, const float* fn, const float* base,                  \
                                  const float* scale, float eps, float rms_eps, long tokens,       \
                                  long hidden, T* y, float* mix, float* rms, int threads) {        \
    pre<T, true>(x, fn, {base, scale, 0, eps, rms_eps}, {tokens, hidden}, y, nullptr, nullptr,     \
                 mix, rms, threads);                                                               \
  }                                                                                                \
  extern "C" void mhc_head_backward_##NAME(                                                        \
      const T* x, const float* fn, const float* base, const float* scale, float eps, long tokens,  \
      long hidden, const float* mix, const float* rms, const T* dy, T* dx, float* dfn,             \
      float* dbase, float* dscale, int threads) {                                                  \
    pre_backward<T, true>(x, fn, {base, scale, 0, eps, 0}, {tokens, hidden}, mix, rms, dy,         \
                          nullptr, nullptr, nullptr, dx, dfn, dbase, dscale, threads);             \
  }                                                                                                \
  extern "C" void mhc_merge_##NAME(const T* y, const T* x, const float* post, const float* comb,   \
                                   long tokens, long hidden, T* out, int threads) {                \
    merge(y, x, post, comb, {tokens, hidden}, out, threads);                                       \
  }                                                                                                \
  extern "C" void mhc_merge_backward_##NAME(const T* dnew, const T* y, const float* post,          \
                                            long tokens, long hidden, T* dy, float* dpost,         \
                                            int threads) {                                         \
    merge_backward(dnew, y, post, {tokens, hidden}, dy, dpost, threads);                           \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)
