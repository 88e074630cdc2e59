// Stores the K and V of a step's tokens in the paged pool, in place.
//
// k      T   (tokens, HK, DK)             v   T (tokens, HK, DV)
// keys   T   (blocks, HK, BS, DK)         values   T (blocks, HK, BS, DV); inputs that are written
// slots  int (tokens,)                    block * BS + offset in the block; negative: the token is skipped
// after  int (1,)                         orders this launch behind earlier accesses of the pool
// token  int (1,)                         1; orders later accesses behind this launch
//
// template: T, HK, DK, DV (widths, multiples of 16 bytes; DV 0: no values), BS
// grid (threads, tokens, 1), threadgroup (threads, 1, 1): a threadgroup copies one token, 16 bytes per thread and turn.
constexpr int W = 16 / int(sizeof(T));
constexpr int KC = DK / W;
constexpr int VC = DV / W;
const int at = int(threadgroup_position_in_grid.y);
const int slot = slots[at];
const int first = int(thread_position_in_threadgroup.x);
const int threads = int(threads_per_threadgroup.x);
if (slot >= 0) {
  const size_t block = size_t(slot / BS);
  const int offset = slot % BS;
  const device uint4* k_from = reinterpret_cast<const device uint4*>(k) + size_t(at) * (HK * KC);
  device uint4* k_to = reinterpret_cast<device uint4*>(const_cast<device T*>(keys));
  for (int i = first; i < HK * KC; i += threads) {
    k_to[((block * HK + i / KC) * BS + offset) * KC + i % KC] = k_from[i];
  }
  if (DV > 0) {
    constexpr int VC1 = VC > 0 ? VC : 1;
    const device uint4* v_from = reinterpret_cast<const device uint4*>(v) + size_t(at) * (HK * VC);
    device uint4* v_to = reinterpret_cast<device uint4*>(const_cast<device T*>(values));
    for (int i = first; i < HK * VC; i += threads) {
      v_to[((block * HK + i / VC1) * BS + offset) * VC + i % VC1] = v_from[i];
    }
  }
}
if (first == 0 && at == 0) {
  token[0] = after[0] | 1;
}
