// Causal depthwise convolution and silu of a ragged batch, over states in a pool that is written in place.
//
// x       T   (rows, C)           the tokens' inputs, sequence after sequence
// weight  T   (C, K)              the last column is the token's own
// conv    T   (slots, K - 1, C)   the last inputs of each sequence, oldest first; an input that is written
// seqs    int (S, 4)              first row, tokens, slot to go on from (negative: from zeros), slot to write
// tiles   int (N, 2)              sequence, first token: a tile is TT tokens, fewer at the sequence's end
// after   int (1,)                orders this launch behind earlier accesses of the pool
// y       T   (rows, C)           silu(sum over j of weight[:, j] * input j), in float32
// token   int (1,)                orders later accesses behind this launch
//
// template: T, C, K (at least 2), TT (at least K - 1)
// grid (C rounded up to 256, N, 1), threadgroup (256, 1, 1): a thread per channel of a tile. Only the first tile of a
// sequence touches its states: the thread reads the old one before it writes the new one, which is made of inputs alone
// unless the sequence is shorter than a state, and then it has no other tile.
constexpr int KEPT = K - 1;
const int channel = int(thread_position_in_grid.x);
const int at = int(threadgroup_position_in_grid.y);
if (channel < C) {
  const int seq = tiles[at * 2];
  const int first = tiles[at * 2 + 1];
  const int row = seqs[seq * 4];
  const int length = seqs[seq * 4 + 1];
  const int from = seqs[seq * 4 + 2];
  const int to = seqs[seq * 4 + 3];
  const int end = min(first + TT, length);
  float w[K];
#pragma unroll
  for (int j = 0; j < K; j++) {
    w[j] = float(weight[channel * K + j]);
  }
  T kept[K];
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    if (first > 0) {
      kept[j] = x[size_t(row + first - KEPT + j) * C + channel];
    } else {
      kept[j] = from < 0 ? T(0.0f) : conv[(size_t(max(from, 0)) * KEPT + j) * C + channel];
    }
  }
  if (first == 0) {
    device T* pool = const_cast<device T*>(conv);
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
      // The state's element j is input length - KEPT + j; those before the first token are elements of the old state.
      T value = x[size_t(row + max(length - KEPT + j, 0)) * C + channel];
#pragma unroll
      for (int i = 0; i < KEPT; i++) {
        if (i == length + j) value = kept[i];
      }
      pool[(size_t(to) * KEPT + j) * C + channel] = value;
    }
  }
  for (int t = first; t < end; t++) {
    kept[KEPT] = x[size_t(row + t) * C + channel];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < K; j++) {
      sum += w[j] * float(kept[j]);
    }
    y[size_t(row + t) * C + channel] = T(sum / (1.0f + metal::exp(-sum)));
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
      kept[j] = kept[j + 1];
    }
  }
}
if (channel == 0 && at == 0) {
  token[0] = after[0] | 1;
}
