// Absorbed multi-head latent attention of decode rows, by simdgroup matrices: many heads share a tile of latents.
//
// inputs, outputs: as mla_decode
// template T (float, half, bfloat), RANK, ROPE, BS, HB blocks of 8 heads per threadgroup, TT tokens per tile (8 or 16,
//          divides BS)
// grid     (256 * N * ceil(H / (8 * HB)), 1, 1), threadgroup (256, 1, 1): 8 * HB heads of one task, next to it its other
//          heads, which find the latents in the cache
//
// A tile of TT latents is brought into threadgroup memory once, for all heads, while the one before it is computed. Eight simdgroups take, of a tile's scores, a block of 8 tokens and a slice of the latent's elements each, with their
// part of the queries in registers; their sums meet in threadgroup memory. Of the results each takes RANK / 8 columns.
constexpr int W = RANK + ROPE;
constexpr int VE = 16 / int(sizeof(T));  // elements per 16-byte vector
constexpr int ROWV = W / VE;
constexpr int ROWP = ROWV + 1;           // a row in threadgroup memory: 8 rows of a matrix then lie in different banks
constexpr int WP = ROWP * VE;
constexpr int TILE = TT * ROWV;
constexpr int NT = 256;
constexpr int PER = (TILE + NT - 1) / NT;
constexpr int TB = TT / 8;
constexpr int SLICES = 8 / TB;
constexpr int STEPS = W / 8 / SLICES;
constexpr int MH = 8 * HB;
constexpr int CB = RANK / 64;            // blocks of 8 columns per simdgroup
constexpr int SP = TT + 4;
constexpr int R = (MH * TT + NT - 1) / NT;

threadgroup uint4 tile[TT * ROWP];
threadgroup float sums[SLICES * MH * SP];
threadgroup T weights[MH * TT];
threadgroup float fades[MH * 8];

const int sg = int(simdgroup_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int tid = int(thread_index_in_threadgroup);
const int max_blocks = iparams[0];
const int H = iparams[1];
const float scale = fparams[0];
const int head_blocks = (H + MH - 1) / MH;
const int task = int(threadgroup_position_in_grid.x) / head_blocks;
const int head0 = int(threadgroup_position_in_grid.x) % head_blocks * MH;
const int seq = tasks[3 * task];
const int t0 = tasks[3 * task + 1];
const int t1 = tasks[3 * task + 2];
const int count = (t1 - t0 + TT - 1) / TT;
const int tb = sg % TB;
const int slice = sg / TB;
const uint4 zero = {0u, 0u, 0u, 0u};
const threadgroup T* rows = (const threadgroup T*)tile;

// Queries come through the tile: simdgroup_load has no bound, and there may be fewer heads than rows.
simdgroup_matrix<T, 8, 8> qm[HB][STEPS];
#pragma unroll
for (int h = 0; h < HB; h += TB) {
  for (int v = tid; v < TILE; v += NT) {
    const int head = min(head0 + h * 8 + v / ROWV, H - 1);
    tile[v / ROWV * ROWP + v % ROWV] = ((const device uint4*)q)[(size_t(seq) * H + head) * ROWV + v % ROWV];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int b = 0; b < TB; b++) {
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      if (h + b < HB) simdgroup_load(qm[h + b][k], rows + b * 8 * WP + (slice * STEPS + k) * 8, WP);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

simdgroup_float8x8 o[HB][CB];
#pragma unroll
for (int h = 0; h < HB; h++) {
#pragma unroll
  for (int c = 0; c < CB; c++) o[h][c] = make_filled_simdgroup_matrix<float, 8>(0.0f);
}
// Of the scores that the thread weighs: head (tid + r * NT) / TT, token % TT.
float m[R];
float l[R];
#pragma unroll
for (int r = 0; r < R; r++) {
  m[r] = -INFINITY;
  l[r] = 0.0f;
}

uint4 staged[PER];
for (int n = 0; n <= count; n++) {
  if (n > 0) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int v = tid + i * NT;
      if (v < TILE) tile[v / ROWV * ROWP + v % ROWV] = staged[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (n < count) {
    const int t = t0 + n * TT;
    const int valid = min(TT, t1 - t) * ROWV;
    const size_t row = size_t(block_tables[seq * max_blocks + t / BS]) * BS + t % BS;
    const device uint4* source = (const device uint4*)latents + row * ROWV;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      // What lies behind the task's end may be anything; it gets weight 0, and 0 * NaN would be NaN.
      staged[i] = zero;
      if (tid + i * NT < valid) staged[i] = source[tid + i * NT];
    }
  }
  if (n > 0) {
    simdgroup_float8x8 s[HB];
#pragma unroll
    for (int h = 0; h < HB; h++) s[h] = make_filled_simdgroup_matrix<float, 8>(0.0f);
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      simdgroup_matrix<T, 8, 8> key;
      simdgroup_load(key, rows + tb * 8 * WP + (slice * STEPS + k) * 8, WP, ulong2(0, 0), true);
#pragma unroll
      for (int h = 0; h < HB; h++) simdgroup_multiply_accumulate(s[h], qm[h][k], key, s[h]);
    }
#pragma unroll
    for (int h = 0; h < HB; h++) simdgroup_store(s[h], sums + (slice * MH + h * 8) * SP + tb * 8, SP);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int head = (tid + r * NT) / TT;
      const int column = tid % TT;
      float score = -INFINITY;
      if (head < MH && t0 + (n - 1) * TT + column < t1) {
        score = 0.0f;
#pragma unroll
        for (int i = 0; i < SLICES; i++) score += sums[(i * MH + head) * SP + column];
        score *= scale;
      }
      float top = score;
#pragma unroll
      for (int d = TT / 2; d >= 1; d /= 2) top = max(top, simd_shuffle_xor(top, ushort(d)));
      top = max(m[r], top);  // finite where there is a head: a tile has a token
      const float fade = metal::exp2(m[r] - top);
      const float p = metal::exp2(score - top);
      if (head < MH) {
        l[r] = l[r] * fade + p;
        m[r] = top;
        weights[head * TT + column] = T(p);
        if (column < 8) fades[head * 8 + column] = fade;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int h = 0; h < HB; h++) {
      simdgroup_float8x8 fade;
      simdgroup_load(fade, fades + h * 64, 8);
#pragma unroll
      for (int c = 0; c < CB; c++) {
        o[h][c].thread_elements()[0] *= fade.thread_elements()[0];
        o[h][c].thread_elements()[1] *= fade.thread_elements()[1];
      }
    }
#pragma unroll
    for (int b = 0; b < TB; b++) {
      simdgroup_matrix<T, 8, 8> w[HB];
#pragma unroll
      for (int h = 0; h < HB; h++) simdgroup_load(w[h], weights + h * 8 * TT + b * 8, TT);
#pragma unroll
      for (int c = 0; c < CB; c++) {
        simdgroup_matrix<T, 8, 8> value;
        simdgroup_load(value, rows + b * 8 * WP + (sg * CB + c) * 8, WP);
#pragma unroll
        for (int h = 0; h < HB; h++) simdgroup_multiply_accumulate(o[h][c], w[h], value, o[h][c]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

#pragma unroll
for (int r = 0; r < R; r++) {
  const int head = (tid + r * NT) / TT;
  float total = l[r];
#pragma unroll
  for (int d = TT / 2; d >= 1; d /= 2) total += simd_shuffle_xor(total, ushort(d));
  if (tid % TT == 0 && head < MH && head0 + head < H) {
    pm[task * H + head0 + head] = m[r];
    pl[task * H + head0 + head] = total;
  }
}
// A block of results goes through threadgroup memory: simdgroup_store has no bound.
threadgroup float* block = sums + sg * 64;
#pragma unroll
for (int h = 0; h < HB; h++) {
#pragma unroll
  for (int c = 0; c < CB; c++) {
    simdgroup_store(o[h][c], block, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int i = lane; i < 64; i += 32) {
      const int head = head0 + h * 8 + i / 8;
      if (head < H) po[(size_t(task) * H + head) * RANK + (sg * CB + c) * 8 + i % 8] = block[i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}
if (threadgroup_position_in_grid.x == 0 && tid == 0) {
  token[0] = after[0] | 1;
}
