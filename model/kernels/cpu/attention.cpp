// Attention over a window and compressed entries (reference B.3) on CPU, one query at a time, in fp32.
//
// Chosen entries are copied into tiles of the thread's own; window and ranges are read in place, their
// edges masked.
//
// Chunks of queries are dealt to the threads in turn. Key gradients are summed over each part's chunks,
// then over the parts: results are the same for the same number of threads, and a query's output does
// not depend on other queries.
#include "keys.h"

namespace {

const float NONE = -__builtin_inff();  // score of a masked key

struct Shape {
  long B, T, H, K, U, E, N, window;  // U: window keys, the queries' own last; N: chosen entries per
                                     // query, 0: all in [first, stop)
  float scale;
};

// What one thread needs to work on a query.
struct Work {
  const Shape& shape;
  long stride;  // scores per head
  Buffer q, grad_o, out, p, dp, rows, packed, grad_rows;
  long chosen = 0;
  long* entry;  // table row of every chosen entry
  long* slot;   // its place in the index
  Segment segments[2];
  int count = 0;

  explicit Work(const Shape& s)
      : shape(s),
        stride(longest(s)),
        q(s.H * s.K),
        grad_o(s.H * s.K),
        out(s.H * s.K),
        p(s.H * stride),
        dp(s.H * stride),
        rows(gathered(s) * s.K),
        packed(gathered(s) * s.K),
        grad_rows(gathered(s) * s.K),
        entry(new long[s.N + 1]),
        slot(new long[s.N + 1]) {}
  ~Work() {
    delete[] entry;
    delete[] slot;
  }

  static long gathered(const Shape& s) { return round_up(s.N ? s.N : 1, LANES); }
  static long longest(const Shape& s) {
    long window = s.window < s.U ? s.window : s.U;
    return round_up(window + 2 * LANES, LANES) + round_up((s.N ? s.N : s.E) + 2 * LANES, LANES);
  }

  void gather(const Table& entries, const int64_t* index) {
    const long K = shape.K;
    chosen = 0;
    for (long n = 0; n < shape.N; ++n)
      if (index[n] >= 0) entry[chosen] = index[n], slot[chosen] = n, ++chosen;
    long tiles = (chosen + LANES - 1) / LANES;
    for (long j = 0; j < tiles * LANES; ++j) {
      if (j < chosen)
        memcpy(rows.p + j * K, entries.rows.p + entry[j] * K, K * sizeof(float));
      else
        memset(rows.p + j * K, 0, K * sizeof(float));
    }
    for (long n = 0; n < tiles; ++n)
      pack_tile(packed.p + n * LANES * K, rows.p + n * LANES * K, K);
  }

  // Lay out the query's keys.
  void look(const Table& window, float* grad_window, const Table* entries, float* grad_entries, long t,
            int64_t start, int64_t first, int64_t stop, const int64_t* index) {
    count = 0;
    long offset = 0;
    long low = start > t - shape.window + 1 ? start : t - shape.window + 1;
    if (low < 0) low = 0;
    auto add = [&](Segment s) {
      s.offset = offset;
      offset += s.tiles * LANES;
      segments[count++] = s;
    };
    if (low <= t) add(range_of(window, grad_window, low, t + 1));
    if (!entries) return;
    if (!shape.N) {
      if (stop > first) add(range_of(*entries, grad_entries, first, stop));
      return;
    }
    gather(*entries, index);
    if (!chosen) return;
    Segment s = {rows.p, packed.p, grad_rows.p, (chosen + LANES - 1) / LANES, 0, chosen, 0};
    add(s);
  }

  // p = scores * scale, NONE outside [low, high)
  void scores() {
    for (int i = 0; i < count; ++i) {
      const Segment& s = segments[i];
      score(p.p, stride, q.p, s, shape.H, shape.K);
      for (long h = 0; h < shape.H; ++h) {
        float* row = p.p + h * stride + s.offset;
        for (long j = 0; j < s.tiles * LANES; j += LANES) store(row + j, load(row + j) * shape.scale);
        for (long j = 0; j < s.low; ++j) row[j] = NONE;
        for (long j = s.high; j < s.tiles * LANES; ++j) row[j] = NONE;
      }
    }
  }
  long keys() const { return count ? segments[count - 1].offset + segments[count - 1].tiles * LANES : 0; }
};

// Turn the scores of one head into probabilities; returns the log of the denominator.
float softmax(float* row, long keys, float sink) {
  vf top = splat(sink);
  for (long j = 0; j < keys; j += LANES) top = max(top, load(row + j));
  float lanes[LANES], highest = sink;
  store(lanes, top);
  for (float a : lanes) highest = max(a, highest);
  vf total = {};
  for (long j = 0; j < keys; j += LANES) {
    vf p = exp(load(row + j) - highest);
    total += p;
    store(row + j, p);
  }
  if (__builtin_isinf(highest)) return highest;  // as logsumexp: NaN for infinite scores, else 0
  float sum_all = sum(total) + __builtin_expf(sink - highest);
  vf inverse = splat(1.0f / sum_all);
  for (long j = 0; j < keys; j += LANES) store(row + j, load(row + j) * inverse);
  return highest + __builtin_logf(sum_all);
}

// Probability of every chosen entry, summed over heads; 0 where nothing was chosen.
void write_mass(const Work& w, float* mass) {
  memset(mass, 0, w.shape.N * sizeof(float));
  if (!w.chosen) return;
  const float* p = w.p.p + w.segments[w.count - 1].offset;
  for (long n = 0; n < w.chosen; ++n) {
    float total = 0;
    for (long h = 0; h < w.shape.H; ++h) total += p[h * w.stride + n];
    mass[w.slot[n]] = total;
  }
}

template <typename T>
void forward(const Shape& s, const T* q, const T* kv, const float* sink, const T* entries, const int64_t* start,
             const int64_t* first, const int64_t* stop, const int64_t* index, T* o, float* lse, float* mass,
             int threads) {
  for (long b = 0; b < s.B; ++b) {
    Table window(s.U, s.K), compressed(entries ? s.E : 1, s.K);
#pragma omp parallel num_threads(threads)
    {
      fill_table(window, kv + b * s.U * s.K);
      if (entries) fill_table(compressed, entries + b * s.E * s.K);
      Work w(s);
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part)
        for_queries(s.T, part, threads, [&](long t) {
          long i = b * s.T + t;
          load_row(w.q.p, q + i * s.H * s.K, s.H * s.K, s.H * s.K);
          w.look(window, nullptr, entries ? &compressed : nullptr, nullptr, s.U - s.T + t, start[i],
                 entries ? first[i] : 0, entries ? stop[i] : 0, index ? index + i * s.N : nullptr);
          w.scores();
          memset(w.out.p, 0, s.H * s.K * sizeof(float));
          for (long h = 0; h < s.H; ++h)
            lse[i * s.H + h] = softmax(w.p.p + h * w.stride, w.keys(), sink[h]);
          for (int n = 0; n < w.count; ++n) mix(w.out.p, w.p.p, w.stride, w.segments[n], s.H, s.K);
          store_row(o + i * s.H * s.K, w.out.p, s.H * s.K);
          if (mass) write_mass(w, mass + i * s.N);
        });
    }
  }
}

// Gradients of q, of the sink, and of both key tables; the scores are formed again.
template <typename T>
void backward(const Shape& s, const T* q, const T* kv, const float* sink, const T* entries, const int64_t* start,
              const int64_t* first, const int64_t* stop, const int64_t* index, const T* o, const float* lse,
              const T* grad_o, T* grad_q, float* grad_kv, float* grad_entries, float* grad_sink, int threads) {
  const long tokens = round_up(s.U, LANES) * s.K, entry_rows = entries ? round_up(s.E, LANES) * s.K : 0;
  Parts private_kv(threads, tokens), private_entries(threads, entry_rows), private_sink(threads, s.H);
  for (int part = 0; part < threads; ++part) private_sink.zeroed(part);
  for (long b = 0; b < s.B; ++b) {
    Table window(s.U, s.K), compressed(entries ? s.E : 1, s.K);
#pragma omp parallel num_threads(threads)
    {
      fill_table(window, kv + b * s.U * s.K);
      if (entries) fill_table(compressed, entries + b * s.E * s.K);
      Work w(s);
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) {
        float *to_kv = private_kv.zeroed(part), *to_entries = private_entries.zeroed(part);
        float* to_sink = private_sink[part];
        for_queries(s.T, part, threads, [&](long t) {
          const long i = b * s.T + t, width = s.H * s.K;
          load_row(w.q.p, q + i * width, width, width);
          load_row(w.grad_o.p, grad_o + i * width, width, width);
          load_row(w.out.p, o + i * width, width, width);
          w.look(window, to_kv, entries ? &compressed : nullptr, to_entries, s.U - s.T + t, start[i],
                 entries ? first[i] : 0, entries ? stop[i] : 0, index ? index + i * s.N : nullptr);
          w.scores();
          for (int n = 0; n < w.count; ++n)
            score(w.dp.p, w.stride, w.grad_o.p, w.segments[n], s.H, s.K);
          for (long h = 0; h < s.H; ++h) {
            vf product = {};
            for (long k = 0; k < s.K; k += LANES)
              product += load(w.grad_o.p + h * s.K + k) * load(w.out.p + h * s.K + k);
            const float delta = sum(product), log_total = lse[i * s.H + h];
            to_sink[h] -= __builtin_expf(sink[h] - log_total) * delta;
            float *p = w.p.p + h * w.stride, *ds = w.dp.p + h * w.stride;
            for (long j = 0; j < w.keys(); j += LANES) {
              vf probability = exp(load(p + j) - log_total);
              store(p + j, probability);
              store(ds + j, probability * (load(ds + j) - delta) * s.scale);
            }
          }
          memset(w.out.p, 0, width * sizeof(float));
          if (w.chosen) memset(w.grad_rows.p, 0, w.chosen * s.K * sizeof(float));
          for (int n = 0; n < w.count; ++n) {
            mix(w.out.p, w.dp.p, w.stride, w.segments[n], s.H, s.K);
            spread<true>(w.segments[n], w.dp.p, w.p.p, w.stride, w.q.p, w.grad_o.p, s.H, s.K);
          }
          for (long n = 0; n < w.chosen; ++n) {
            float* to = to_entries + w.entry[n] * s.K;
            for (long k = 0; k < s.K; k += LANES) store(to + k, load(to + k) + load(w.grad_rows.p + n * s.K + k));
          }
          store_row(grad_q + i * width, w.out.p, width);
        });
      }
      add_up(grad_kv + b * s.U * s.K, private_kv, s.U * s.K, threads);
      if (entries) add_up(grad_entries + b * s.E * s.K, private_entries, s.E * s.K, threads);
    }
  }
  for (long h = 0; h < s.H; ++h) {
    grad_sink[h] = 0;
    for (int part = 0; part < threads; ++part) grad_sink[h] += private_sink[part][h];
  }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                         \
  extern "C" void attention_forward_##SUFFIX(                                                                     \
      const T* q, const T* kv, const float* sink, const T* entries, const int64_t* start, const int64_t* first,   \
      const int64_t* stop, const int64_t* index, T* o, float* lse, float* mass, long B, long Tk, long H, long K,  \
      long U, long E, long N, long window, float scale, int threads) {                                            \
    forward<T>({B, Tk, H, K, U, E, N, window, scale}, q, kv, sink, entries, start, first, stop, index, o, lse,    \
               mass, threads);                                                                                    \
  }                                                                                                               \
  extern "C" void attention_backward_##SUFFIX(                                                                    \
      const T* q, const T* kv, const float* sink, const T* entries, const int64_t* start, const int64_t* first,   \
      const int64_t* stop, const int64_t* index, const T* o, const float* lse, const T* grad_o, T* grad_q,        \
      float* grad_kv, float* grad_entries, float* grad_sink, long B, long Tk, long H, long K, long U, long E,     \
      long N, long window, float scale, int threads) {                                                            \
    backward<T>({B, Tk, H, K, U, E, N, window, scale}, q, kv, sink, entries, start, first, stop, index, o, lse,   \
                grad_o, grad_q, grad_kv, grad_entries, grad_sink, threads);                                       \
  }
EXPORT(float, f32)
EXPORT(bf16, bf16)
