// Gated delta rule of one token per sequence, over states in a pool that is written in place.
//
// qkv     T     (rows, C)            outputs of the convolution: HK query heads of DK, as many key heads, HV value heads
//                                    of DV; C = 2 * HK * DK + HV * DV. Value head h goes with key head h / (HV / HK).
// a, b    T     (rows, HV)           inputs of the gates
// a_log   any   (HV,)                dt_bias any (HV,)
// states  float (slots, HV, DV, DK)  an input that is written
// seqs    int   (S, 4)               row, 1 (0: none, nothing is stored and y is left unset), slot to go on from
//                                    (negative: from zeros), slot that the new state goes to
// after   int   (1,)                 orders this launch behind earlier accesses of the pool
// y       T     (rows, HV, DV)
// token   int   (1,)                 orders later accesses behind this launch
//
// q and k are divided by their norms, q also by sqrt(DK); g = exp(-exp(a_log) * softplus(a + dt_bias)); beta =
// sigmoid(b). For each row of a state: s = g * s; s += k * beta * (v - s . k); y = s . q. All in float32.
//
// template: T, HK, HV, DK (multiple of 16), DV (multiple of 8 * NSG), NSG
// grid (4 * DV, HV, S), threadgroup (32 * NSG, 1, 1): four lanes per row of a state, eight rows per simdgroup. A lane
// keeps every fourth 16-byte vector of its row. Threads read and write nothing but their own part of a state.
constexpr int C = 2 * HK * DK + HV * DV;
constexpr int CH = DK / 16;

const int lane = int(thread_index_in_simdgroup);
const int part = lane % 4;
const int head = int(threadgroup_position_in_grid.y);
const int seq = int(threadgroup_position_in_grid.z);
const int dv = (int(threadgroup_position_in_grid.x) * NSG + int(simdgroup_index_in_threadgroup)) * 8 + lane / 4;
if (seqs[seq * 4 + 1] == 0) {  // a whole threadgroup; never the first sequence, which makes the token
  return;
}
const size_t row = size_t(seqs[seq * 4]);
const int from = seqs[seq * 4 + 2];
const int to = seqs[seq * 4 + 3];

float s[CH * 4];
const device float4* source = (const device float4*)states;
// A new sequence reads the slot that it is going to write, for any other one may be written by another sequence.
const size_t own = (size_t(from < 0 ? to : from) * HV + head) * DV + dv;
#pragma unroll
for (int c = 0; c < CH; c++) {
  const float4 vector = source[own * (DK / 4) + c * 4 + part];
  s[c * 4] = vector.x;
  s[c * 4 + 1] = vector.y;
  s[c * 4 + 2] = vector.z;
  s[c * 4 + 3] = vector.w;
}
const float raw_a = float(a[row * HV + head]) + float(dt_bias[head]);
const float small = metal::exp(-(raw_a < 0.0f ? -raw_a : raw_a));
// log(1 + small), also where 1 + small rounds.
const float tail = small < 0.03f
    ? small * (1.0f - small * (0.5f - small * (1.0f / 3.0f - small * (0.25f - small * 0.2f))))
    : metal::log(1.0f + small);
const float g = metal::exp(-metal::exp(float(a_log[head])) * ((raw_a > 0.0f ? raw_a : 0.0f) + tail));
const float beta = 1.0f / (1.0f + metal::exp(-float(b[row * HV + head])));

float q[CH * 4];
float k[CH * 4];
float q_square = 0.0f;
float k_square = 0.0f;
float memory = 0.0f;
const size_t q_base = row * C + head / (HV / HK) * DK;
#pragma unroll
for (int c = 0; c < CH; c++) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int i = c * 4 + j;
    q[i] = float(qkv[q_base + (c * 4 + part) * 4 + j]);
    k[i] = float(qkv[q_base + HK * DK + (c * 4 + part) * 4 + j]);
    s[i] = from < 0 ? 0.0f : s[i] * g;
    q_square += q[i] * q[i];
    k_square += k[i] * k[i];
    memory += s[i] * k[i];
  }
}
#pragma unroll
for (int d = 1; d <= 2; d *= 2) {
  q_square += simd_shuffle_xor(q_square, ushort(d));
  k_square += simd_shuffle_xor(k_square, ushort(d));
  memory += simd_shuffle_xor(memory, ushort(d));
}
const float k_scale = metal::rsqrt(k_square + 1e-6f);
const float q_scale = metal::rsqrt((q_square + 1e-6f) * float(DK));
const float value = float(qkv[row * C + 2 * HK * DK + head * DV + dv]);
const float delta = (value - memory * k_scale) * beta * k_scale;
float out = 0.0f;
#pragma unroll
for (int i = 0; i < CH * 4; i++) {
  s[i] += k[i] * delta;
  out += s[i] * q[i];
}
#pragma unroll
for (int d = 1; d <= 2; d *= 2) {
  out += simd_shuffle_xor(out, ushort(d));
}
if (part == 0) {
  y[(row * HV + head) * DV + dv] = T(out * q_scale);
}
device float4* pool = (device float4*)const_cast<device float*>(states);
const size_t target = (size_t(to) * HV + head) * DV + dv;
#pragma unroll
for (int c = 0; c < CH; c++) {
  float4 vector;
  vector.x = s[c * 4];
  vector.y = s[c * 4 + 1];
  vector.z = s[c * 4 + 2];
  vector.w = s[c * 4 + 3];
  pool[target * (DK / 4) + c * 4 + part] = vector;
}
if (seq == 0 && head == 0 && threadgroup_position_in_grid.x == 0 && thread_index_in_threadgroup == 0) {
  token[0] = after[0] | 1;
}
