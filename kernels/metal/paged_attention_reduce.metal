// Joins the partial results of paged_attention_decode (or of any kernel that leaves the same): one row of attention output.
//
// partial float (items, QT, HQ, D)    sums of exp2(score - maximum) * value, per partition of the keys
// stats   float (items, QT, HQ, 2)    the maxima (in units of log 2; -1e30 without a key) and the sums of exp2(...)
// sinks   T   (HQ,)                   logits of a key without a value; read only if SINKS
// work    int (tokens, 4)             first item, number of items, token within the items, 0
// ints    int (8,)                    QT
// out     T   (tokens, HQ, D)         0 for a row without any key
//
// template: T, D, SINKS (bool), NSG
// grid (32 * NSG * HQ, tokens, 1), threadgroup (32 * NSG, 1, 1): simdgroup g takes items g, g + NSG, ...
constexpr int E = (D + 31) / 32;
constexpr float LOWEST = -1e30f;
constexpr float LOG2_E = 1.4426950408889634f;

threadgroup float s_out[NSG * E * 32];
threadgroup float s_sum[NSG];

const int lane = int(thread_index_in_simdgroup);
const int sg = int(simdgroup_index_in_threadgroup);
const int head = int(threadgroup_position_in_grid.x);
const int heads = int(threadgroups_per_grid.x);
const int at = int(threadgroup_position_in_grid.y);
const int items = work[at * 4 + 1];
const size_t row = (size_t(work[at * 4]) * ints[0] + work[at * 4 + 2]) * heads + head;
const size_t step = size_t(ints[0]) * heads;
const float sink = SINKS ? float(sinks[head]) * LOG2_E : LOWEST;

float top = LOWEST;
for (int j = lane; j < items; j += 32) {
  top = metal::max(top, stats[(row + j * step) * 2]);
}
top = metal::max(simd_max(top), sink);
float sum = 0.0f;
float acc[E];
#pragma unroll
for (int e = 0; e < E; e++) {
  acc[e] = 0.0f;
}
#pragma unroll 4
for (int j = sg; j < items; j += NSG) {
  const size_t from = row + j * step;
  const float weight = metal::fast::exp2(stats[from * 2] - top);
  sum += stats[from * 2 + 1] * weight;
#pragma unroll
  for (int e = 0; e < E; e++) {
    if (e * 32 + lane < D) {
      acc[e] += partial[from * D + e * 32 + lane] * weight;
    }
  }
}
#pragma unroll
for (int e = 0; e < E; e++) {
  s_out[(sg * E + e) * 32 + lane] = acc[e];
}
if (lane == 0) {
  s_sum[sg] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
sum = SINKS ? metal::fast::exp2(sink - top) : 0.0f;
for (int g = 0; g < NSG; g++) {
  sum += s_sum[g];
}
const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
for (int d = int(thread_index_in_threadgroup); d < D; d += 32 * NSG) {
  float value = 0.0f;
  for (int g = 0; g < NSG; g++) {
    value += s_out[g * E * 32 + d];
  }
  out[(size_t(at) * heads + head) * D + d] = T(value * scale);
}
