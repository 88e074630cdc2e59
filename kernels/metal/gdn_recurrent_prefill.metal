// Gated delta rule over a ragged batch, over states in a pool that is written in place.
//
// qkv     T     (rows, C)            outputs of the convolution: HK query heads of DK, as many key heads, HV value heads
//                                    of DV; C = 2 * HK * DK + HV * DV. Value head h goes with key head h / (HV / HK).
// a, b    T     (rows, HV)           inputs of the gates
// a_log   any   (HV,)                dt_bias any (HV,)
// states  float (slots, HV, DV, DK)  an input that is written
// seqs    int   (S, 4)               first row, tokens (>= 1), slot to go on from (negative: from zeros), slot to write
// after   int   (1,)                 orders this launch behind earlier accesses of the pool
// y       T     (rows, HV, DV)
// token   int   (1,)                 orders later accesses behind this launch
//
// q and k are divided by their norms, q also by sqrt(DK); g = exp(-exp(a_log) * softplus(a + dt_bias)); beta =
// sigmoid(b). For each token and row of a state: s = g * s; s += k * beta * (v - s . k); y = s . q. All in float32.
//
// template: T, HK, HV, DK (multiple of 16), DV (multiple of 8 * NSG), NSG, TT
// grid (4 * DV, HV, S), threadgroup (32 * NSG, 1, 1): four lanes per row of a state, eight rows per simdgroup, which
// stay in registers over all tokens of a sequence. A lane keeps every fourth 16-byte vector of its row. TT tokens at a
// time, with norms and gates applied, are brought into threadgroup memory for all rows.
constexpr int C = 2 * HK * DK + HV * DV;
constexpr int CH = DK / 16;
constexpr int ROWS = 8 * NSG;

threadgroup float4 s_q[TT * DK / 4];
threadgroup float4 s_k[TT * DK / 4];
threadgroup float s_v[TT * ROWS];
threadgroup float s_g[TT];
threadgroup float s_beta[TT];

const int lane = int(thread_index_in_simdgroup);
const int sg = int(simdgroup_index_in_threadgroup);
const int tid = int(thread_index_in_threadgroup);
const int part = lane % 4;
const int head = int(threadgroup_position_in_grid.y);
const int seq = int(threadgroup_position_in_grid.z);
const int first_dv = int(threadgroup_position_in_grid.x) * ROWS;
const int own_row = sg * 8 + lane / 4;
const size_t row0 = size_t(seqs[seq * 4]);
const int length = seqs[seq * 4 + 1];
const int from = seqs[seq * 4 + 2];
const int to = seqs[seq * 4 + 3];

float s[CH * 4];
const device float4* source = (const device float4*)states;
// A new sequence reads the slot that it is going to write, for any other one may be written by another sequence.
const size_t own = (size_t(from < 0 ? to : from) * HV + head) * DV + first_dv + own_row;
#pragma unroll
for (int c = 0; c < CH; c++) {
  const float4 vector = source[own * (DK / 4) + c * 4 + part];
  s[c * 4] = from < 0 ? 0.0f : vector.x;
  s[c * 4 + 1] = from < 0 ? 0.0f : vector.y;
  s[c * 4 + 2] = from < 0 ? 0.0f : vector.z;
  s[c * 4 + 3] = from < 0 ? 0.0f : vector.w;
}
const float decay = metal::exp(float(a_log[head]));
const float bias = float(dt_bias[head]);

for (int t0 = 0; t0 < length; t0 += TT) {
  const int count = min(TT, length - t0);
  for (int t = sg; t < count; t += NSG) {
    const size_t row = row0 + t0 + t;
    const size_t base = row * C + head / (HV / HK) * DK;
    float square_q = 0.0f;
    float square_k = 0.0f;
    for (int i = lane; i < DK; i += 32) {
      const float q = float(qkv[base + i]);
      const float k = float(qkv[base + HK * DK + i]);
      square_q += q * q;
      square_k += k * k;
    }
    const float q_scale = metal::rsqrt((simd_sum(square_q) + 1e-6f) * float(DK));
    const float k_scale = metal::rsqrt(simd_sum(square_k) + 1e-6f);
    threadgroup float* q_row = (threadgroup float*)s_q + t * DK;
    threadgroup float* k_row = (threadgroup float*)s_k + t * DK;
    for (int i = lane; i < DK; i += 32) {
      q_row[i] = float(qkv[base + i]) * q_scale;
      k_row[i] = float(qkv[base + HK * DK + i]) * k_scale;
    }
    if (lane == 0) {
      const float raw_a = float(a[row * HV + head]) + bias;
      const float small = metal::exp(-(raw_a < 0.0f ? -raw_a : raw_a));
      // log(1 + small), also where 1 + small rounds.
      const float tail = small < 0.03f
          ? small * (1.0f - small * (0.5f - small * (1.0f / 3.0f - small * (0.25f - small * 0.2f))))
          : metal::log(1.0f + small);
      s_g[t] = metal::exp(-decay * ((raw_a > 0.0f ? raw_a : 0.0f) + tail));
      s_beta[t] = 1.0f / (1.0f + metal::exp(-float(b[row * HV + head])));
    }
  }
  for (int i = tid; i < count * ROWS; i += 32 * NSG) {
    const size_t row = row0 + t0 + i / ROWS;
    s_v[i] = float(qkv[row * C + 2 * HK * DK + head * DV + first_dv + i % ROWS]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int t = 0; t < count; t++) {
    const float g = s_g[t];
    float memory = 0.0f;
    float k[CH * 4];
#pragma unroll
    for (int c = 0; c < CH; c++) {
      const float4 vector = s_k[t * (DK / 4) + c * 4 + part];
      k[c * 4] = vector.x;
      k[c * 4 + 1] = vector.y;
      k[c * 4 + 2] = vector.z;
      k[c * 4 + 3] = vector.w;
    }
#pragma unroll
    for (int i = 0; i < CH * 4; i++) {
      s[i] *= g;
      memory += s[i] * k[i];
    }
    memory += simd_shuffle_xor(memory, ushort(1));
    memory += simd_shuffle_xor(memory, ushort(2));
    const float delta = (s_v[t * ROWS + own_row] - memory) * s_beta[t];
    float out = 0.0f;
#pragma unroll
    for (int c = 0; c < CH; c++) {
      const float4 vector = s_q[t * (DK / 4) + c * 4 + part];
      s[c * 4] += k[c * 4] * delta;
      s[c * 4 + 1] += k[c * 4 + 1] * delta;
      s[c * 4 + 2] += k[c * 4 + 2] * delta;
      s[c * 4 + 3] += k[c * 4 + 3] * delta;
      out += s[c * 4] * vector.x + s[c * 4 + 1] * vector.y + s[c * 4 + 2] * vector.z + s[c * 4 + 3] * vector.w;
    }
    out += simd_shuffle_xor(out, ushort(1));
    out += simd_shuffle_xor(out, ushort(2));
    if (part == 0) {
      y[((row0 + t0 + t) * HV + head) * DV + first_dv + own_row] = T(out);
    }
  }
  // The next tokens overwrite what slower simdgroups still read.
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

device float4* pool = (device float4*)const_cast<device float*>(states);
const size_t target = (size_t(to) * HV + head) * DV + first_dv + own_row;
#pragma unroll
for (int c = 0; c < CH; c++) {
  float4 vector;
  vector.x = s[c * 4];
  vector.y = s[c * 4 + 1];
  vector.z = s[c * 4 + 2];
  vector.w = s[c * 4 + 3];
  pool[target * (DK / 4) + c * 4 + part] = vector;
}
if (seq == 0 && head == 0 && threadgroup_position_in_grid.x == 0 && tid == 0) {
  token[0] = after[0] | 1;
}
