// Combine the tasks of each sequence that mla_decode computed.
//
// inputs   po (N, H, RANK), pm, pl (N * H) float32: as mla_decode writes them
//          spans (S, 2) int32: first task and number of tasks of each sequence (0: out is not a number)
// output   out (S, H, RANK) T
// template T, RANK
// grid     (128 * H, S, 1), threadgroup (128, 1, 1): one head of one sequence
const int head = int(threadgroup_position_in_grid.x);
const int H = int(threadgroups_per_grid.x);
const int seq = int(threadgroup_position_in_grid.y);
const int first = spans[2 * seq];
const int end = first + spans[2 * seq + 1];

float m = -INFINITY;
for (int j = first; j < end; j++) m = max(m, pm[j * H + head]);
float l = 0.0f;
float o[RANK / 128];
#pragma unroll
for (int i = 0; i < RANK / 128; i++) o[i] = 0.0f;
for (int j = first; j < end; j++) {
  const float w = metal::exp2(pm[j * H + head] - m);
  l += w * pl[j * H + head];
#pragma unroll
  for (int i = 0; i < RANK / 128; i++) {
    o[i] += w * po[(size_t(j) * H + head) * RANK + i * 128 + int(thread_position_in_threadgroup.x)];
  }
}
#pragma unroll
for (int i = 0; i < RANK / 128; i++) {
  out[(size_t(seq) * H + head) * RANK + i * 128 + int(thread_position_in_threadgroup.x)] = T(o[i] / l);
}
