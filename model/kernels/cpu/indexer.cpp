// The lightning indexer (reference B.7, B.8) on CPU, one query at a time, in fp32:
//   I[t, i] = sum_j w[t, j] * relu(q[t, j] . k[i])
// top-k over the visible entries, and the KL loss over the chosen ones with all its gradients at once.
//
// Chunks of queries are dealt to the threads in turn; key gradients and losses are summed over each
// part's chunks, then over the parts. A NaN score ranks highest, as in torch.topk: it is chosen and so
// reaches the loss.
#include <algorithm>

#include "keys.h"

namespace {

struct Shape {
  long B, T, J, L, E, N;  // J heads of L channels, N entries to choose
};

// The N best (score, entry) seen so far. Entries arrive in ascending order; on equal scores the earlier
// one stays. A score not above the floor cannot get in, so most vectors cost one comparison. NaN is
// above all, and -inf counts as the lowest finite score, so that it is above the first floor.
struct Best {
  struct Item {
    float score;
    int32_t entry;
    bool operator<(const Item& other) const {  // is better
      if (score > other.score || score < other.score) return score > other.score;
      const bool nan = score != score, other_nan = other.score != other.score;
      return nan != other_nan ? nan : entry < other.entry;
    }
  };
  long wanted, count = 0;
  float floor = -__builtin_inff();
  Item* items;

  explicit Best(long wanted) : wanted(wanted), items(new Item[2 * wanted + LANES]) {}
  ~Best() { delete[] items; }
  Best(const Best&) = delete;

  void clear() { count = 0, floor = -__builtin_inff(); }
  void add(vf scores, long first, long low, long high) {
    scores = scores < splat(-__FLT_MAX__) ? splat(-__FLT_MAX__) : scores;
    vi above = ~(scores <= splat(floor));
    int32_t any = 0, lanes[LANES];
    memcpy(lanes, &above, sizeof(lanes));
    for (int32_t lane : lanes) any |= lane;
    if (!any) return;
    float values[LANES];
    store(values, scores);
    for (long j = 0; j < LANES; ++j)
      if (lanes[j] && first + j >= low && first + j < high) items[count++] = {values[j], int32_t(first + j)};
    if (count > 2 * wanted - 1) shrink();
  }
  void shrink() {
    if (count <= wanted) return;
    std::nth_element(items, items + wanted - 1, items + count);
    count = wanted;
    floor = items[wanted - 1].score;
    if (floor != floor) floor = __builtin_inff();  // then only a NaN gets in
  }
};

// scores of NT tiles of keys: sum_j w_j relu(q_j . k)
template <int NT>
INLINE void scores_of(vf* out, const float* q, const float* w, const float* packed, long J, long L) {
  constexpr int NH = 4;
  for (int n = 0; n < NT; ++n) out[n] = vf{};
  auto heads = [&](auto NUM, long j) {
    constexpr int H = decltype(NUM)::value;
    vf acc[H][NT] = {};
    for (long l = 0; l < L; ++l) {
      vf keys[NT];
      repeat<NT>([&](auto n) { keys[n] = load(packed + (n * L + l) * LANES); });
      repeat<H>([&](auto h) {
        vf value = splat(q[(j + h) * L + l]);
        repeat<NT>([&](auto n) { acc[h][n] += value * keys[n]; });
      });
    }
    repeat<H>([&](auto h) {
      vf weight = splat(w[j + h]);
      repeat<NT>([&](auto n) { out[n] += weight * relu(acc[h][n]); });
    });
  };
  long j = 0;
  for (; j + NH <= J; j += NH) heads(std::integral_constant<int, NH>{}, j);
  for (; j < J; ++j) heads(std::integral_constant<int, 1>{}, j);
}

template <typename T>
void topk(const Shape& s, const T* q, const T* k, const float* w, const int64_t* first, const int64_t* stop,
          int64_t* index, int threads) {
  for (long b = 0; b < s.B; ++b) {
    Table keys(s.E, s.L);
#pragma omp parallel num_threads(threads)
    {
      fill_table(keys, k + b * s.E * s.L);
      Buffer query(s.J * s.L);
      Best best(s.N);
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part)
        for_queries(s.T, part, threads, [&](long t) {
          const long i = b * s.T + t, low = first[i], high = stop[i];
          int64_t* to = index + i * s.N;
          long found = 0;
          if (high - low <= s.N) {
            for (long e = low; e < high; ++e) to[found++] = e;
          } else {
            load_row(query.p, q + i * s.J * s.L, s.J * s.L, s.J * s.L);
            best.clear();
            long tile = low / LANES, end = (high + LANES - 1) / LANES;
            for (; tile < end; tile += 4) {
              vf scores[4];
              if (tile + 4 <= end)
                scores_of<4>(scores, query.p, w + i * s.J, keys.packed.p + tile * LANES * s.L, s.J, s.L);
              else
                for (long n = 0; n < end - tile; ++n)
                  scores_of<1>(scores + n, query.p, w + i * s.J, keys.packed.p + (tile + n) * LANES * s.L, s.J, s.L);
              for (long n = 0; n < 4 && tile + n < end; ++n) best.add(scores[n], (tile + n) * LANES, low, high);
            }
            best.shrink();
            for (; found < best.count; ++found) to[found] = best.items[found].entry;
            std::sort(to, to + found);
          }
          for (; found < s.N; ++found) to[found] = -1;
        });
    }
  }
}

// KL(teacher || softmax(I)) over the chosen entries, summed over queries, and its gradients.
template <typename T>
void loss(const Shape& s, const T* q, const T* k, const float* w, const int64_t* index, const float* mass,
          double* total, T* grad_q, float* grad_k, float* grad_w, int threads) {
  const long entry_rows = round_up(s.E, LANES) * s.L, width = s.J * s.L, wide = round_up(s.N, LANES);
  Parts private_k(threads, entry_rows);
  double* private_total = new double[threads]();
  for (long b = 0; b < s.B; ++b) {
    Table keys(s.E, s.L);
#pragma omp parallel num_threads(threads)
    {
      fill_table(keys, k + b * s.E * s.L);
      Buffer query(width), grad_query(width), rows(wide * s.L), packed(wide * s.L), grad_rows(wide * s.L);
      Buffer dots(s.J * wide), student(wide), teacher(wide);
      long* entry = new long[s.N + 1];
#pragma omp for schedule(static, 1)
      for (int part = 0; part < threads; ++part) {
        float* to_k = private_k.zeroed(part);
        for_queries(s.T, part, threads, [&](long t) {
          const long i = b * s.T + t;
          memset(grad_query.p, 0, width * sizeof(float));
          memset(grad_w + i * s.J, 0, s.J * sizeof(float));
          float mass_sum = 0;
          long n = 0;
          for (long m = 0; m < s.N; ++m)
            if (index[i * s.N + m] >= 0) {
              teacher.p[n] = mass[i * s.N + m];
              mass_sum += teacher.p[n];
              entry[n++] = index[i * s.N + m];
            }
          if (n > 0) {
            load_row(query.p, q + i * width, width, width);
            const Segment chosen = {rows.p, packed.p, grad_rows.p, (n + LANES - 1) / LANES, 0, n, 0};
            for (long j = 0; j < chosen.tiles * LANES; ++j) {
              if (j < n)
                memcpy(rows.p + j * s.L, keys.rows.p + entry[j] * s.L, s.L * sizeof(float));
              else
                memset(rows.p + j * s.L, 0, s.L * sizeof(float));
            }
            for (long m = 0; m < chosen.tiles; ++m) pack_tile(packed.p + m * LANES * s.L, rows.p + m * LANES * s.L, s.L);
            score(dots.p, wide, query.p, chosen, s.J, s.L);
            const long padded = chosen.tiles * LANES;
            for (long h = 0; h < s.J; ++h)  // infinite queries make NaN of the padding
              for (long j = n; j < padded; ++j) dots.p[h * wide + j] = 0;
            memset(student.p, 0, padded * sizeof(float));
            for (long h = 0; h < s.J; ++h)
              for (long j = 0; j < padded; j += LANES)
                store(student.p + j, load(student.p + j) + w[i * s.J + h] * relu(load(dots.p + h * wide + j)));
            // log softmax over the n chosen
            float highest = student.p[0], sum_all = 0;
            for (long j = 1; j < n; ++j) highest = max(student.p[j], highest);
            for (long j = 0; j < n; ++j) sum_all += __builtin_expf(student.p[j] - highest);
            const float lse = highest + __builtin_logf(sum_all);
            const float inverse = 1.0f / max(mass_sum, 1e-30f);
            const float taught = mass_sum < 1e-30f ? mass_sum * inverse : 1.0f;  // sum of the teacher
            double kl = 0;
            for (long j = 0; j < n; ++j) {
              const float p = teacher.p[j] * inverse, log_q = student.p[j] - lse;
              kl += (p == 0 ? 0 : p * __builtin_logf(p)) - p * log_q;
              student.p[j] = __builtin_expf(log_q) * taught - p;  // gradient of the score
            }
            for (long j = n; j < padded; ++j) student.p[j] = 0;
            private_total[part] += kl;
            for (long h = 0; h < s.J; ++h) {
              vf grad = {};
              for (long j = 0; j < padded; j += LANES) {
                float* at = dots.p + h * wide + j;
                vf dot = load(at), ds = load(student.p + j);
                grad += ds * relu(dot);
                store(at, dot <= vf{} ? vf{} : ds * w[i * s.J + h]);
              }
              grad_w[i * s.J + h] = sum(grad);
            }
            mix(grad_query.p, dots.p, wide, chosen, s.J, s.L);
            memset(grad_rows.p, 0, n * s.L * sizeof(float));
            spread<false>(chosen, dots.p, dots.p, wide, query.p, query.p, s.J, s.L);
            for (long j = 0; j < n; ++j) {
              float* to = to_k + entry[j] * s.L;
              for (long l = 0; l < s.L; l += LANES) store(to + l, load(to + l) + load(grad_rows.p + j * s.L + l));
            }
          }
          store_row(grad_q + i * width, grad_query.p, width);
        });
      }
      add_up(grad_k + b * s.E * s.L, private_k, s.E * s.L, threads);
      delete[] entry;
    }
  }
  *total = 0;
  for (int part = 0; part < threads; ++part) *total += private_total[part];
  delete[] private_total;
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                        \
  extern "C" void index_topk_##SUFFIX(const T* q, const T* k, const float* w, const int64_t* first,              \
                                      const int64_t* stop, int64_t* index, long B, long Tk, long J, long L,      \
                                      long E, long N, int threads) {                                             \
    topk<T>({B, Tk, J, L, E, N}, q, k, w, first, stop, index, threads);                                          \
  }                                                                                                              \
  extern "C" void indexer_loss_##SUFFIX(const T* q, const T* k, const float* w, const int64_t* index,            \
                                        const float* mass, double* total, T* grad_q, float* grad_k,              \
                                        float* grad_w, long B, long Tk, long J, long L, long E, long N,          \
                                        int threads) {                                                           \
    loss<T>({B, Tk, J, L, E, N}, q, k, w, index, mass, total, grad_q, grad_k, grad_w, threads);                  \
  }
EXPORT(float, f32)
EXPORT(bf16, bf16)
