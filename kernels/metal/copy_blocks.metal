// Copies whole blocks of the paged pool onto others, in place. No block may be both source and destination.
//
// keys   T   (blocks, HK, BS, DK)         values   T (blocks, HK, BS, DV); inputs that are written
// pairs  int (copies, 2)                  source block, destination block
// after  int (1,)                         orders this launch behind earlier accesses of the pool
// token  int (1,)                         1; orders later accesses behind this launch
//
// template: T, KN, VN (elements of a block of K and of V, multiples of 16 bytes; VN 0: no values)
// grid (threads, copies, 1), threadgroup (threads, 1, 1): a threadgroup copies one pair, 16 bytes per thread and turn.
constexpr int W = 16 / int(sizeof(T));
constexpr int KC = KN / W;
constexpr int VC = VN / W;
const int at = int(threadgroup_position_in_grid.y);
const size_t from = size_t(pairs[2 * at]);
const size_t to = size_t(pairs[2 * at + 1]);
const int first = int(thread_position_in_threadgroup.x);
const int threads = int(threads_per_threadgroup.x);
device uint4* k_pool = reinterpret_cast<device uint4*>(const_cast<device T*>(keys));
for (int i = first; i < KC; i += threads) {
  k_pool[to * KC + i] = k_pool[from * KC + i];
}
if (VN > 0) {
  device uint4* v_pool = reinterpret_cast<device uint4*>(const_cast<device T*>(values));
  for (int i = first; i < VC; i += threads) {
    v_pool[to * VC + i] = v_pool[from * VC + i];
  }
}
if (first == 0 && at == 0) {
  token[0] = after[0] | 1;
}
