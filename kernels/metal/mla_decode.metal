// Absorbed multi-head latent attention of decode rows over a paged cache of latents, one pass, KV split into tasks.
//
// inputs   q (S, H, W) T, W = RANK + ROPE: queries in the latents' space, behind them their rotated parts
//          latents (blocks * BS, W) T: the pool; a token's value is the first RANK elements of its latent
//          block_tables (S, B) int32; tasks (N, 3) int32: sequence, first token (a multiple of TT), end (where it is no
//          more than first there are no tokens: po 0, pm -inf, pl 0)
//          iparams {B, H} int32; fparams {scale * log2(e)} float32; after int (1,): orders this launch behind earlier
//          accesses of the pool
// outputs  po (N, H, RANK) float32: sum over the task's tokens of exp2(score - pm) * value
//          pm (N * H) float32: largest score, base 2; pl (N * H) float32: sum of exp2(score - pm). All are written.
//          token int (1,): orders later accesses behind this launch
// template T (float, half, bfloat), RANK, ROPE, BS, HB heads per simdgroup, NSG simdgroups, TT tokens per tile (TT
//          divides BS; HB * TT is 8, 16 or 32)
// grid     (32 * NSG * N * ceil(H / (NSG * HB)), 1, 1), threadgroup (32 * NSG, 1, 1): NSG * HB heads of one task, next
//          to it its other heads, which find the latents in the cache
//
// A tile of TT latents is brought into threadgroup memory once, for all heads, while the one before it is computed.
// The lanes of a simdgroup share out the elements of a latent, so that the same 16-byte vectors serve as key and as
// value; the HB * TT partial scores of the lanes are summed by halving, which leaves each score on the lane of its
// number: about one shuffle per score.
constexpr int W = RANK + ROPE;
constexpr int VE = 16 / int(sizeof(T));  // elements per 16-byte vector
constexpr int NV = RANK / (32 * VE);     // vectors of the latent's value part per lane
constexpr int RE = ROPE / 32;            // elements of the rotated key per lane
constexpr int ROWV = W / VE;             // vectors per token
constexpr int TILE = TT * ROWV;
constexpr int NT = 32 * NSG;
constexpr int PER = (TILE + NT - 1) / NT;
constexpr int NVAL = HB * TT;

threadgroup uint4 tiles[2 * TILE];

const int lane = int(thread_index_in_simdgroup);
const int sg = int(simdgroup_index_in_threadgroup);
const int tid = int(thread_index_in_threadgroup);
const int max_blocks = iparams[0];
const int H = iparams[1];
const float scale = fparams[0];
const int head_blocks = (H + NSG * HB - 1) / (NSG * HB);
const int task = int(threadgroup_position_in_grid.x) / head_blocks;
const int head0 = (int(threadgroup_position_in_grid.x) % head_blocks * NSG + sg) * HB;
const int seq = tasks[3 * task];
const int t0 = tasks[3 * task + 1];
const int t1 = tasks[3 * task + 2];
const int count = (t1 - t0 + TT - 1) / TT;
const uint4 zero = {0u, 0u, 0u, 0u};

float o[HB][NV * VE];
#pragma unroll
for (int h = 0; h < HB; h++) {
#pragma unroll
  for (int i = 0; i < NV * VE; i++) o[h][i] = 0.0f;
}
// Of the lane's head in the scores' order: lane % NVAL = head * TT + token.
float m = -INFINITY;
float l = 0.0f;

for (int n = 0; n <= count; n++) {
  uint4 staged[PER];
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
    const threadgroup uint4* tile = tiles + ((n - 1) % 2) * TILE;
    float s[NVAL];
#pragma unroll
    for (int i = 0; i < NVAL; i++) s[i] = 0.0f;
#pragma unroll 1
    for (int c = 0; c < NV; c++) {
      float qv[HB][VE];
#pragma unroll
      for (int h = 0; h < HB; h++) {
        const int head = min(head0 + h, H - 1);
        const uint4 raw = ((const device uint4*)q)[(size_t(seq) * H + head) * ROWV + c * 32 + lane];
#pragma unroll
        for (int j = 0; j < VE; j++) qv[h][j] = packed_element<T>(raw, j);
      }
#pragma unroll
      for (int t = 0; t < TT; t++) {
        const uint4 raw = tile[t * ROWV + c * 32 + lane];
#pragma unroll
        for (int j = 0; j < VE; j++) {
          const float x = packed_element<T>(raw, j);
#pragma unroll
          for (int h = 0; h < HB; h++) s[h * TT + t] += qv[h][j] * x;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < RE; j++) {
      const int column = RANK + lane * RE + j;
      float qr[HB];
#pragma unroll
      for (int h = 0; h < HB; h++) qr[h] = float(q[(size_t(seq) * H + min(head0 + h, H - 1)) * W + column]);
#pragma unroll
      for (int t = 0; t < TT; t++) {
        const float x = float(((const threadgroup T*)tile)[t * W + column]);
#pragma unroll
        for (int h = 0; h < HB; h++) s[h * TT + t] += qr[h] * x;
      }
    }
    // Sum over the lanes. While there are fewer scores than lanes, each lane keeps all; then each keeps half of them.
#pragma unroll
    for (int k = 0; k < 5; k++) {
      const int d = 16 >> k;
      const bool upper = (lane & d) != 0;
#pragma unroll
      for (int i = 0; i < NVAL; i++) {
        if (d >= NVAL) {
          s[i] += simd_shuffle_xor(s[i], ushort(d));
        } else if (i < d) {
          const float kept = upper ? s[i + d] : s[i];
          const float given = upper ? s[i] : s[i + d];
          s[i] = kept + simd_shuffle_xor(given, ushort(d));
        }
      }
    }
    const bool seen = t0 + (n - 1) * TT + lane % TT < t1;
    const float score = seen ? s[0] * scale : -INFINITY;
    float top = score;
#pragma unroll
    for (int d = TT / 2; d >= 1; d /= 2) top = max(top, simd_shuffle_xor(top, ushort(d)));
    top = max(m, top);  // finite: a tile has a token
    const float fade = metal::exp2(m - top);
    const float p = metal::exp2(score - top);
    l = l * fade + p;
    m = top;
#pragma unroll
    for (int h = 0; h < HB; h++) {
      const float f = simd_shuffle(fade, ushort(h * TT));
#pragma unroll
      for (int i = 0; i < NV * VE; i++) o[h][i] *= f;
    }
#pragma unroll 2
    for (int t = 0; t < TT; t++) {
      float w[HB];
#pragma unroll
      for (int h = 0; h < HB; h++) w[h] = simd_shuffle(p, ushort(h * TT + t));
#pragma unroll
      for (int c = 0; c < NV; c++) {
        const uint4 raw = tile[t * ROWV + c * 32 + lane];
#pragma unroll
        for (int j = 0; j < VE; j++) {
          const float x = packed_element<T>(raw, j);
#pragma unroll
          for (int h = 0; h < HB; h++) o[h][c * VE + j] += w[h] * x;
        }
      }
    }
  }
  if (n < count) {
#pragma unroll
    for (int i = 0; i < PER; i++) {
      if (tid + i * NT < TILE) tiles[(n % 2) * TILE + tid + i * NT] = staged[i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

#pragma unroll
for (int d = TT / 2; d >= 1; d /= 2) l += simd_shuffle_xor(l, ushort(d));
if (lane < NVAL && lane % TT == 0 && head0 + lane / TT < H) {
  pm[task * H + head0 + lane / TT] = m;
  pl[task * H + head0 + lane / TT] = l;
}
#pragma unroll
for (int h = 0; h < HB; h++) {
  if (head0 + h < H) {
    const size_t row = (size_t(task) * H + head0 + h) * RANK;
#pragma unroll
    for (int c = 0; c < NV; c++) {
#pragma unroll
      for (int j = 0; j < VE; j++) po[row + (c * 32 + lane) * VE + j] = o[h][c * VE + j];
    }
  }
}
if (threadgroup_position_in_grid.x == 0 && tid == 0) {
  token[0] = after[0] | 1;
}
