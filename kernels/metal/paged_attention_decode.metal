// Attention of few query tokens per sequence over the paged pool, split over partitions of the keys: partial results.
//
// q       T   (tokens, HK * G, D)
// own_k, own_v   T (tokens, HK, D)        of the step; not read without STORE
// keys, values   T (blocks, HK, BS, D)    the pool; with STORE inputs that are written
// tables  int (sequences, width)          block ids
// work    int (items, 8)                  an item is a run of keys of a sequence: row of `tables`, first token, number of
//                                         tokens, keys that the last token sees, first key, key behind the last, 0, 0
// ints    int (8,)                        tokens per sequence at most (QT), width of `tables`, window (0: none)
// floats  float (8,)                      factor on the products, soft-cap in units of log 2
// after   int (1,)                        orders this launch behind earlier accesses of keys and values
// partial float (items, QT, HK * G, D)    sum of exp2(score - maximum) * value
// stats   float (items, QT, HK * G, 2)    the maximum and the sum of exp2(score - maximum); -1e30 and 0 without a key
// token   int (1,)                        1; orders later accesses behind this launch
//
// Rows of an item are (token, head of the group), R at a time per threadgroup: they share each load of K and V. Token i
// of n sees keys [end - window, end) with end = keys of the last token - (n - 1 - i).
//
// With STORE a sequence has one token, whose own key is the last that it sees. The threadgroups that see it take it from
// own_k and own_v, while one of them stores it in the pool: nobody else reads that row, or writes any.
//
// template: T, D, BS, HK, G, R (rows, a power of two), LANES (per key), U (keys in flight per lane), NSG (simdgroups),
//           CAP (bool: soft-cap), STORE (bool)
// grid (32 * NSG * HK * row chunks, items, 1), threadgroup (32 * NSG, 1, 1)
//
// LANES lanes hold a key, each W or a few times W of its elements; 32 / LANES keys stand side by side ("subs") and U come
// one after another, so a simdgroup takes a tile of keys at once. The R * U products of a lane are summed over the LANES
// lanes by halving: each step hands the other half of the scores over, and in the end each lane holds its own few scores.
constexpr int W = 16 / int(sizeof(T));
constexpr int LOADS = D / W;
constexpr int C = (LOADS + LANES - 1) / LANES;
constexpr int E = C * W;
constexpr int SUBS = 32 / LANES;
constexpr int TILE = SUBS * U;
constexpr int N = R * U;
constexpr int M = N > LANES ? N / LANES : 1;
constexpr int REP = N < LANES ? LANES / N : 1;
constexpr int UL = M < U ? M : U;
constexpr int RL = M / UL;
constexpr int SPREAD = U / UL;
constexpr int LOG_LANES = LANES == 32 ? 5 : LANES == 16 ? 4 : LANES == 8 ? 3 : LANES == 4 ? 2 : 1;
constexpr int RB = NSG * R * D <= 4096 ? R : NSG * R * D <= 8192 ? (R + 1) / 2 : NSG * R * D <= 16384 ? (R + 3) / 4 : 1;
constexpr float LOWEST = -1e30f;
constexpr uint OWN = 0xffffffffu;

threadgroup float s_max[NSG * R];
threadgroup float s_sum[NSG * R];
threadgroup float s_out[NSG * RB * D];

const int lane = int(thread_index_in_simdgroup);
const int sg = int(simdgroup_index_in_threadgroup);
const int sub = lane / LANES;
const int part = lane % LANES;
const int item = int(threadgroup_position_in_grid.y);
const int kv_head = int(threadgroup_position_in_grid.x) % HK;
const int first_row = int(threadgroup_position_in_grid.x) / HK * R;
const int most_tokens = ints[0];
const int width = ints[1];
const int window = ints[2];
const float factor = floats[0];
const float cap = floats[1];
const int table = work[item * 8] * width;
const int first_token = work[item * 8 + 1];
const int tokens = work[item * 8 + 2];
const int seen = work[item * 8 + 3];
const int k0 = work[item * 8 + 4];
const int k1 = work[item * 8 + 5];
const int rows = tokens * G - first_row;
if (item == 0 && first_row == 0 && kv_head == 0 && thread_index_in_threadgroup == 0) {
  token[0] = after[0] | 1;
}
if (rows <= 0) {
  return;
}
const int own = STORE ? seen - 1 : -1;
const device T* head_k = own_k + (size_t(first_token) * HK + kv_head) * D;
const device T* head_v = own_v + (size_t(first_token) * HK + kv_head) * D;
if (STORE && first_row == 0 && k1 == seen) {
  const size_t to = (size_t(tables[table + own / BS]) * HK + kv_head) * BS + own % BS;
  device uint4* k_to = reinterpret_cast<device uint4*>(const_cast<device T*>(keys)) + to * LOADS;
  device uint4* v_to = reinterpret_cast<device uint4*>(const_cast<device T*>(values)) + to * LOADS;
  for (int x = int(thread_index_in_threadgroup); x < LOADS; x += 32 * NSG) {
    k_to[x] = reinterpret_cast<const device uint4*>(head_k)[x];
    v_to[x] = reinterpret_cast<const device uint4*>(head_v)[x];
  }
}

float query[R][E];
float acc[R][E];
#pragma unroll
for (int r = 0; r < R; r++) {
  const int row = first_row + metal::min(r, rows - 1);
  const device T* from = q + (size_t(first_token + row / G) * (HK * G) + kv_head * G + row % G) * D;
#pragma unroll
  for (int c = 0; c < C; c++) {
    const int chunk = c * LANES + part;
    const bool mine = r < rows && chunk < LOADS;
#pragma unroll
    for (int w = 0; w < W; w++) {
      query[r][c * W + w] = mine ? float(from[chunk * W + w]) * factor : 0.0f;
      acc[r][c * W + w] = 0.0f;
    }
  }
}
// The scores that this lane holds after the halving: M of them, of RL rows, and which keys those rows see.
float highest[RL];
float total[RL];
int own_begin[RL];
int own_end[RL];
#pragma unroll
for (int j = 0; j < RL; j++) {
  const int r = (part / REP * M + j * UL) / U;
  const int end = seen - tokens + 1 + (first_row + r) / G;
  highest[j] = LOWEST;
  total[j] = 0.0f;
  own_end[j] = r < rows ? metal::min(k1, end) : 0;
  own_begin[j] = window > 0 ? end - window : 0;
}
const int own_key = (part / REP * M) % U * SUBS + sub;

// The pool's row of each key of a tile, or OWN. Keys behind the last are read as the last one again, and masked.
uint at[U];
uint4 k_raw[U][C];
uint4 v_raw[U][C];
const int start = k0 + sg * TILE;
#pragma unroll
for (int u = 0; u < U; u++) {
  const int key = metal::min(start + u * SUBS + sub, k1 - 1);
  at[u] = STORE && key == own ? OWN : (uint(tables[table + key / BS]) * HK + uint(kv_head)) * BS + uint(key % BS);
  const device T* from = STORE && at[u] == OWN ? head_k : keys + size_t(at[u]) * D;
#pragma unroll
  for (int c = 0; c < C; c++) {
    const int chunk = metal::min(c * LANES + part, LOADS - 1);
    k_raw[u][c] = *reinterpret_cast<const device uint4*>(from + chunk * W);
  }
}
for (int base = start; base < k1; base += NSG * TILE) {
  int block[U];
#pragma unroll
  for (int u = 0; u < U; u++) {
    block[u] = tables[table + metal::min(base + NSG * TILE + u * SUBS + sub, k1 - 1) / BS];
    const device T* from = STORE && at[u] == OWN ? head_v : values + size_t(at[u]) * D;
#pragma unroll
    for (int c = 0; c < C; c++) {
      const int chunk = metal::min(c * LANES + part, LOADS - 1);
      v_raw[u][c] = *reinterpret_cast<const device uint4*>(from + chunk * W);
    }
  }
  float score[N];
#pragma unroll
  for (int u = 0; u < U; u++) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      score[r * U + u] = 0.0f;
    }
#pragma unroll
    for (int e = 0; e < E; e++) {
      const float k = packed_element<T>(k_raw[u][e / W], e % W);
#pragma unroll
      for (int r = 0; r < R; r++) {
        score[r * U + u] += query[r][e] * k;
      }
    }
  }
  // The next tile's keys travel while this one's scores become weights.
  if (base + NSG * TILE < k1) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int key = metal::min(base + NSG * TILE + u * SUBS + sub, k1 - 1);
      at[u] = STORE && key == own ? OWN : (uint(block[u]) * HK + uint(kv_head)) * BS + uint(key % BS);
      const device T* from = STORE && at[u] == OWN ? head_k : keys + size_t(at[u]) * D;
#pragma unroll
      for (int c = 0; c < C; c++) {
        const int chunk = metal::min(c * LANES + part, LOADS - 1);
        k_raw[u][c] = *reinterpret_cast<const device uint4*>(from + chunk * W);
      }
    }
  }
#pragma unroll
  for (int s = 0; s < LOG_LANES; s++) {
    const int bit = LANES >> (s + 1);
    const int half_n = N >> (s + 1);
    if (half_n > 0) {
      const bool upper = (part & bit) != 0;
#pragma unroll
      for (int i = 0; i < N / 2; i++) {
        // A loop of fixed length unrolls for sure. With one up to half_n, scores ended up in memory on NVIDIA GPUs.
        if (i < half_n) {
          const float low = score[i];
          const float high = score[i + half_n];
          score[i] = (upper ? high : low) + simd_shuffle_xor(upper ? low : high, ushort(bit));
        }
      }
    } else {
      score[0] += simd_shuffle_xor(score[0], ushort(bit));
    }
  }
  float shrink[RL];
  bool grew = false;
#pragma unroll
  for (int j = 0; j < RL; j++) {
    float top = highest[j];
#pragma unroll
    for (int i = 0; i < UL; i++) {
      const int key = base + own_key + i * SUBS;
      float s = score[j * UL + i];
      if (CAP) {
        s = cap * metal::precise::tanh(s);
      }
      s = key >= own_begin[j] && key < own_end[j] ? s : LOWEST;
      score[j * UL + i] = s;
      top = metal::max(top, s);
    }
#pragma unroll
    for (int b = REP; b < REP * SPREAD; b *= 2) {
      top = metal::max(top, simd_shuffle_xor(top, ushort(b)));
    }
    shrink[j] = metal::fast::exp2(highest[j] - top);
    grew = grew || top > highest[j];
    highest[j] = top;
    total[j] *= shrink[j];
#pragma unroll
    for (int i = 0; i < UL; i++) {
      const float s = score[j * UL + i];
      const float p = s > LOWEST ? metal::fast::exp2(s - top) : 0.0f;
      score[j * UL + i] = p;
      total[j] += p;
    }
  }
  if (simd_any(grew)) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int n = r * U;
      const float a = simd_shuffle(shrink[n % M / UL], ushort(sub * LANES + n / M * REP));
#pragma unroll
      for (int e = 0; e < E; e++) {
        acc[r][e] *= a;
      }
    }
  }
#pragma unroll
  for (int u = 0; u < U; u++) {
    float p[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int n = r * U + u;
      p[r] = simd_shuffle(score[n % M], ushort(sub * LANES + n / M * REP));
    }
#pragma unroll
    for (int e = 0; e < E; e++) {
      const float v = packed_element<T>(v_raw[u][e / W], e % W);
#pragma unroll
      for (int r = 0; r < R; r++) {
        acc[r][e] += p[r] * v;
      }
    }
  }
}
// One maximum and sum per row: over the subs, then over the simdgroups, which meet in threadgroup memory.
#pragma unroll
for (int j = 0; j < RL; j++) {
#pragma unroll
  for (int b = REP; b < REP * SPREAD; b *= 2) {
    total[j] += simd_shuffle_xor(total[j], ushort(b));
  }
}
float top_of[R];
#pragma unroll
for (int r = 0; r < R; r++) {
  const int n = r * U;
  const ushort holder = ushort(sub * LANES + n / M * REP);
  const float sub_top = simd_shuffle(highest[n % M / UL], holder);
  float sum = simd_shuffle(total[n % M / UL], holder);
  float top = sub_top;
#pragma unroll
  for (int b = LANES; b < 32; b *= 2) {
    top = metal::max(top, simd_shuffle_xor(top, ushort(b)));
  }
  const float a = metal::fast::exp2(sub_top - top);
  sum *= a;
#pragma unroll
  for (int b = LANES; b < 32; b *= 2) {
    sum += simd_shuffle_xor(sum, ushort(b));
  }
#pragma unroll
  for (int e = 0; e < E; e++) {
    acc[r][e] *= a;
#pragma unroll
    for (int b = LANES; b < 32; b *= 2) {
      acc[r][e] += simd_shuffle_xor(acc[r][e], ushort(b));
    }
  }
  top_of[r] = top;
  if (lane == 0) {
    s_max[sg * R + r] = top;
    s_sum[sg * R + r] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
for (int rb = 0; rb < R; rb += RB) {
#pragma unroll
  for (int i = 0; i < RB; i++) {
    float top = LOWEST;
    for (int g = 0; g < NSG; g++) {
      top = metal::max(top, s_max[g * R + rb + i]);
    }
    const float a = metal::fast::exp2(top_of[rb + i] - top);
#pragma unroll
    for (int c = 0; c < C; c++) {
      const int chunk = c * LANES + part;
      if (sub == 0 && chunk < LOADS) {
#pragma unroll
        for (int w = 0; w < W; w++) {
          s_out[(sg * RB + i) * D + chunk * W + w] = acc[rb + i][c * W + w] * a;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int x = int(thread_index_in_threadgroup); x < RB * D; x += 32 * NSG) {
    const int r = rb + x / D;
    const int row = first_row + r;
    if (r < rows) {
      const size_t to = (size_t(item) * most_tokens + row / G) * (HK * G) + kv_head * G + row % G;
      float out = 0.0f;
      for (int g = 0; g < NSG; g++) {
        out += s_out[g * RB * D + x];
      }
      partial[to * D + x % D] = out;
      if (x % D == 0) {
        float top = LOWEST;
        for (int g = 0; g < NSG; g++) {
          top = metal::max(top, s_max[g * R + r]);
        }
        float sum = 0.0f;
        for (int g = 0; g < NSG; g++) {
          sum += s_sum[g * R + r] * metal::fast::exp2(s_max[g * R + r] - top);
        }
        stats[to * 2] = top;
        stats[to * 2 + 1] = sum;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
