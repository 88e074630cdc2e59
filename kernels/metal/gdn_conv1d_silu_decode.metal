// Causal depthwise convolution and silu of one token per sequence, over states in a pool that is written in place.
//
// x       T   (S, C)              the tokens' inputs; token i belongs to sequence i
// weight  T   (C, K)              the last column is the token's own
// conv    T   (slots, K - 1, C)   the last inputs of each sequence, oldest first; an input that is written
// seqs    int (S, 4)              row, 1 (0: none, nothing is stored and y is left unset), slot to go on from (negative:
//                                 from zeros), slot that the new state goes to
// after   int (1,)                orders this launch behind earlier accesses of the pool
// y       T   (S, C)              silu(sum over j of weight[:, j] * input j), in float32
// token   int (1,)                orders later accesses behind this launch
//
// template: T, C, K (at least 2)
// grid (C rounded up to 256, S, 1), threadgroup (256, 1, 1): a thread per channel of a sequence. A thread reads all of
// its state before it writes, and no other thread reads or writes what it writes: the slots written are all different, but
// for slot 0, which nobody goes on from then, and a slot that one sequence goes on from is written by that one only.
constexpr int KEPT = K - 1;
const int channel = int(thread_position_in_grid.x);
const int seq = int(threadgroup_position_in_grid.y);
if (channel < C && seqs[seq * 4 + 1] > 0) {
  const int row = seqs[seq * 4];
  const int from = seqs[seq * 4 + 2];
  const int to = seqs[seq * 4 + 3];
  T kept[K];
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    kept[j] = from < 0 ? T(0.0f) : conv[(size_t(max(from, 0)) * KEPT + j) * C + channel];
  }
  kept[KEPT] = x[size_t(row) * C + channel];
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < K; j++) {
    sum += float(weight[channel * K + j]) * float(kept[j]);
  }
  y[size_t(row) * C + channel] = T(sum / (1.0f + metal::exp(-sum)));
  device T* pool = const_cast<device T*>(conv);
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    pool[(size_t(to) * KEPT + j) * C + channel] = kept[j + 1];
  }
}
if (channel == 0 && seq == 0) {
  token[0] = after[0] | 1;
}
