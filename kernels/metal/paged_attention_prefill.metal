// Attention of prompt chunks over the paged pool: variable lengths, causal over the cached prefix and the chunk itself.
//
// q      T   (tokens, HK * G, D)          keys, values   T (blocks, HK, BS, D)
// sinks  any (HK * G,)                    logits of a key without a value; read only if SINKS
// tables int (sequences, width)           block ids
// work   int (tiles, 8)                   a tile is a run of rows of a chunk: row of `tables`, first token of the chunk in q,
//                                         number of its tokens, keys that its last token sees, first row of the tile,
//                                         output row of the chunk's first token, 0, 0
// ints   int (8,)                         0, width of `tables`, window (0: none)
// floats float (8,)                       factor on the products, soft-cap in units of log 2
// after  int (1,)                         orders this launch behind the writes of keys and values
// out    T   (output rows, HK * G, D)
// token  int (1,)                         1; orders later writes behind this launch
//
// Rows are (token, head of the group), so that the heads of a group share each load. Token i of n sees keys
// [end - window, end) with end = keys of the last token - (n - 1 - i).
//
// template: T, D, BS, HK, G, RB (blocks of 8 rows per simdgroup), BK (keys per step, a multiple of 8), PAD (elements between
//           keys in threadgroup memory, a multiple of 16 bytes), NSG (simdgroups), CAP (bool: soft-cap), SINKS (bool)
// grid (32 * NSG * HK, tiles, 1), threadgroup (32 * NSG, 1, 1); a tile has 8 * RB * NSG rows
//
// A lane holds elements (row, column) and (row, column + 1) of each 8 x 8 matrix (common.h: MATRIX_ROW).
constexpr int W = 16 / int(sizeof(T));
constexpr int LOADS = D / W;
constexpr int LD = D + PAD;
constexpr int DB = D / 8;
constexpr int KB = BK / 8;
constexpr float LOWEST = -1e30f;
constexpr float LOG2_E = 1.4426950408889634f;

threadgroup uint4 s_keys[BK * LD / W];
threadgroup uint4 s_values[BK * LD / W];

const int lane = int(thread_index_in_simdgroup);
const int sg = int(simdgroup_index_in_threadgroup);
const int kv_head = int(threadgroup_position_in_grid.x);
const int tile = int(threadgroup_position_in_grid.y);
const int table = work[tile * 8] * ints[1];
const int window = ints[2];
const float factor = floats[0];
const float cap = floats[1];
const int first_token = work[tile * 8 + 1];
const int tokens = work[tile * 8 + 2];
const int before = work[tile * 8 + 3] - tokens + 1;
const int first_row = work[tile * 8 + 4];
const int placed = work[tile * 8 + 5];
const int rows = tokens * G;
const int tile_end = metal::min(first_row + 8 * RB * NSG, rows);
const int sg_row = first_row + sg * 8 * RB;
const int sg_end = metal::min(sg_row + 8 * RB, rows);
const int k0 = window > 0 ? metal::max(0, before + first_row / G - window) : 0;
const int k1 = before + (tile_end - 1) / G;
const int sg_k0 = window > 0 ? metal::max(0, before + sg_row / G - window) : 0;
const int sg_k1 = sg_row < rows ? before + (sg_end - 1) / G : 0;
const int fm = MATRIX_ROW(lane);
const int fn = MATRIX_COLUMN(lane);
if (tile == 0 && kv_head == 0 && thread_index_in_threadgroup == 0) {
  token[0] = after[0] | 1;
}

simdgroup_matrix<T, 8, 8> query[RB][DB];
simdgroup_matrix<float, 8, 8> acc[RB][DB];
float highest[RB];
float total[RB];
int own_begin[RB];
int own_end[RB];
#pragma unroll
for (int b = 0; b < RB; b++) {
  const int row = sg_row + b * 8 + fm;
  const int read = metal::min(row, rows - 1);
  const device T* from = q + (size_t(first_token + read / G) * (HK * G) + kv_head * G + read % G) * D;
  own_end[b] = row < rows ? before + row / G : 0;
  own_begin[b] = window > 0 ? own_end[b] - window : 0;
  highest[b] = LOWEST;
  total[b] = 0.0f;
#pragma unroll
  for (int d = 0; d < DB; d++) {
    query[b][d].thread_elements()[0] = from[d * 8 + fn];
    query[b][d].thread_elements()[1] = from[d * 8 + fn + 1];
    acc[b][d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}
const device uint4* pool_keys = reinterpret_cast<const device uint4*>(keys);
const device uint4* pool_values = reinterpret_cast<const device uint4*>(values);
const threadgroup T* tile_keys = reinterpret_cast<const threadgroup T*>(s_keys);
const threadgroup T* tile_values = reinterpret_cast<const threadgroup T*>(s_values);
for (int base = k0; base < k1; base += BK) {
  for (int i = int(thread_index_in_threadgroup); i < BK * LOADS; i += 32 * NSG) {
    const int key = metal::min(base + i / LOADS, k1 - 1);
    const size_t at = (size_t(tables[table + key / BS]) * HK + kv_head) * BS + key % BS;
    s_keys[i / LOADS * (LD / W) + i % LOADS] = pool_keys[at * LOADS + i % LOADS];
    s_values[i / LOADS * (LD / W) + i % LOADS] = pool_values[at * LOADS + i % LOADS];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (base < sg_k1 && base + BK > sg_k0) {
    simdgroup_matrix<float, 8, 8> score[RB][KB];
#pragma unroll
    for (int k = 0; k < KB; k++) {
#pragma unroll
      for (int b = 0; b < RB; b++) {
        score[b][k] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      }
#pragma unroll
      for (int d = 0; d < DB; d++) {
        simdgroup_matrix<T, 8, 8> transposed;
        transposed.thread_elements()[0] = tile_keys[(k * 8 + fn) * LD + d * 8 + fm];
        transposed.thread_elements()[1] = tile_keys[(k * 8 + fn + 1) * LD + d * 8 + fm];
#pragma unroll
        for (int b = 0; b < RB; b++) {
          simdgroup_multiply_accumulate(score[b][k], query[b][d], transposed, score[b][k]);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < RB; b++) {
      float top = highest[b];
#pragma unroll
      for (int k = 0; k < KB; k++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int key = base + k * 8 + fn + j;
          float s = score[b][k].thread_elements()[j] * factor;
          if (CAP) {
            s = cap * metal::precise::tanh(s);
          }
          s = key >= own_begin[b] && key < own_end[b] ? s : LOWEST;
          score[b][k].thread_elements()[j] = s;
          top = metal::max(top, s);
        }
      }
      top = metal::max(top, simd_shuffle_xor(top, ushort(MATRIX_ROW_BIT_0)));
      top = metal::max(top, simd_shuffle_xor(top, ushort(MATRIX_ROW_BIT_1)));
      const float shrink = metal::fast::exp2(highest[b] - top);
      highest[b] = top;
      total[b] *= shrink;
#pragma unroll
      for (int k = 0; k < KB; k++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float s = score[b][k].thread_elements()[j];
          const float p = s > LOWEST ? metal::fast::exp2(s - top) : 0.0f;
          score[b][k].thread_elements()[j] = p;
          total[b] += p;
        }
      }
#pragma unroll
      for (int d = 0; d < DB; d++) {
        acc[b][d].thread_elements()[0] *= shrink;
        acc[b][d].thread_elements()[1] *= shrink;
      }
    }
#pragma unroll
    for (int k = 0; k < KB; k++) {
#pragma unroll
      for (int d = 0; d < DB; d++) {
        simdgroup_matrix<T, 8, 8> value;
        value.thread_elements()[0] = tile_values[(k * 8 + fm) * LD + d * 8 + fn];
        value.thread_elements()[1] = tile_values[(k * 8 + fm) * LD + d * 8 + fn + 1];
#pragma unroll
        for (int b = 0; b < RB; b++) {
          simdgroup_multiply_accumulate(acc[b][d], score[b][k], value, acc[b][d]);
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
#pragma unroll
for (int b = 0; b < RB; b++) {
  const int row = sg_row + b * 8 + fm;
  float sum = total[b];
  sum += simd_shuffle_xor(sum, ushort(MATRIX_ROW_BIT_0));
  sum += simd_shuffle_xor(sum, ushort(MATRIX_ROW_BIT_1));
  float scale = 1.0f;
  if (SINKS) {
    const float sink = float(sinks[kv_head * G + metal::min(row, rows - 1) % G]) * LOG2_E;
    const float top = metal::max(highest[b], sink);
    scale = metal::fast::exp2(highest[b] - top);
    sum = sum * scale + metal::fast::exp2(sink - top);
  }
  scale = sum > 0.0f ? scale / sum : 0.0f;
  if (row < rows) {
    device T* to = out + (size_t(placed + row / G) * (HK * G) + kv_head * G + row % G) * D;
#pragma unroll
    for (int d = 0; d < DB; d++) {
      to[d * 8 + fn] = T(acc[b][d].thread_elements()[0] * scale);
      to[d * 8 + fn + 1] = T(acc[b][d].thread_elements()[1] * scale);
    }
  }
}
