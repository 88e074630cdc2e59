// One threadgroup: a fiber per thread, its barriers and meetings of simdgroups, and who runs next.
//
// All threads of a threadgroup, and all lanes of a simdgroup, have to come to the same barrier or simd operation: none may
// have returned, none may stand at another place of the text. Metal asks this of threadgroup_barrier; for simd operations
// it is stricter than Metal, as CUDA is.
#pragma once
#include "fibers.h"
#include <stdio.h>

namespace emu {
constexpr unsigned LANES = 32, MOST_THREADS = 1024, MOST_GROUPS = MOST_THREADS / LANES;
constexpr unsigned SHARED_BYTES = 32 * 1024;  // of threadgroup memory, on every Mac GPU so far
constexpr unsigned SLOT_BYTES = 64;
constexpr unsigned MESSAGE_BYTES = 512;
constexpr unsigned SHARED = 0, DEVICE = 1;  // kinds of memory that a barrier orders

struct Size {
  unsigned x, y, z;
  unsigned count() const { return x * y * z; }
};
enum Order { ASCENDING, DESCENDING, SHUFFLED };  // of threads that may run, and of threadgroups

struct Simdgroup {
  uint32_t present, waiting;  // bit per lane
  unsigned site;              // where those that wait do so: line * 1000 + column
  uint64_t trace;             // and what they did before without waiting
  unsigned phase;             // of the slots in use; those of the meeting before may still be read
  uint32_t step[2];           // changes with each barrier that orders the kind of memory
  alignas(64) unsigned char slots[2][LANES][SLOT_BYTES];
};

struct Threadgroup {
  Size grid, size, groups, place;
  Order order;
  bool lockstep;  // simd operations order a simdgroup's memory too
  uint64_t random;
  char* stacks;
  size_t stack_bytes;
  void (*body)(void*, unsigned);
  void* arguments;

  unsigned threads, current;
  bool running;
  void* scheduler;
  void* state[MOST_THREADS];
  bool returned[MOST_THREADS];
  uint64_t trace[MOST_THREADS];
  Simdgroup simdgroups[MOST_GROUPS];
  uint32_t ready[MOST_GROUPS], ready_groups;  // bit per lane, bit per simdgroup
  unsigned left, at_barrier, barrier_site, barrier_flags;
  bool any_returned;
  uint32_t epoch[2];     // changes with each threadgroup and each barrier that orders the kind of memory
  uint32_t first_epoch;  // of this threadgroup
  char message[MESSAGE_BYTES];
};
inline Threadgroup now;
inline uint32_t last_epoch;

// Ends the launch: back to the scheduler, for good.
[[noreturn]] inline void fail(const char* format, unsigned a = 0, unsigned b = 0, unsigned c = 0, const char* name = nullptr) {
  if (!now.message[0]) snprintf(now.message, sizeof now.message, format, a, b, c);
  if (name) strncat(now.message, name, 64);
  void* never;
  emu_switch(&never, now.scheduler);
  __builtin_unreachable();
}

inline unsigned random_bit(uint32_t set) {
  now.random ^= now.random << 13;
  now.random ^= now.random >> 7;
  now.random ^= now.random << 17;
  for (unsigned skipped = now.random % __builtin_popcount(set); skipped; skipped--) set &= set - 1;
  return __builtin_ctz(set);
}
inline unsigned chosen_bit(uint32_t set) {
  return now.order == ASCENDING ? __builtin_ctz(set) : now.order == DESCENDING ? 31 - __builtin_clz(set) : random_bit(set);
}
inline void make_ready(unsigned group, uint32_t lanes) {
  now.ready[group] |= lanes;
  now.ready_groups |= 1u << group;
}

// Leave this fiber for the next that may run. Ascending and descending orders run one simdgroup as far as it gets.
inline void run_next(void** left) {
  Threadgroup& t = now;
  if (!t.ready_groups) {
    if (t.left) fail("deadlock: %u threads wait for a barrier or simd operation that others do not reach", t.left);
    emu_switch(left, t.scheduler);
    return;
  }
  const unsigned group = chosen_bit(t.ready_groups), lane = chosen_bit(t.ready[group]);
  t.ready[group] &= ~(1u << lane);
  if (!t.ready[group]) t.ready_groups &= ~(1u << group);
  t.current = group * LANES + lane;
  emu_switch(left, t.state[t.current]);
}

inline void thread_main() {
  Threadgroup& t = now;
  t.body(t.arguments, t.current);
  t.returned[t.current] = t.any_returned = true;
  t.left--;
  if (t.at_barrier) fail("a thread returned while others wait at the barrier of line %u", t.barrier_site / 1000);
  if (t.simdgroups[t.current / LANES].waiting)
    fail("a lane returned while others wait at the simd operation of line %u", t.simdgroups[t.current / LANES].site / 1000);
  void* never;
  run_next(&never);
  __builtin_unreachable();
}

// flags: bit per kind of memory that is ordered.
inline void barrier(unsigned flags, unsigned site) {
  Threadgroup& t = now;
  if (t.any_returned) fail("a thread waits at the barrier of line %u after another has returned", site / 1000);
  if (!t.at_barrier) {
    t.barrier_site = site;
    t.barrier_flags = flags;
  } else if (t.barrier_site != site) {
    fail("divergence: threads of one threadgroup wait at the barriers of lines %u and %u", t.barrier_site / 1000, site / 1000);
  } else if (t.barrier_flags != flags) {
    fail("threads give the barrier of line %u different flags", site / 1000);
  }
  if (++t.at_barrier < t.threads) return run_next(&t.state[t.current]);
  t.at_barrier = 0;
  last_epoch++;
  for (unsigned kind = 0; kind < 2; kind++)
    if (flags >> kind & 1) t.epoch[kind] = last_epoch;
  for (unsigned group = 0; group * LANES < t.threads; group++) make_ready(group, t.simdgroups[group].present);
  const unsigned lane = t.current % LANES, group = t.current / LANES;
  t.ready[group] &= ~(1u << lane);
  if (!t.ready[group]) t.ready_groups &= ~(1u << group);
}

inline unsigned lane() { return now.current % LANES; }

// What all lanes do together without exchanging anything. Found out at the next meeting if they did not.
inline void mark(unsigned site) { now.trace[now.current] = now.trace[now.current] * 31 + site; }

// The values of a simdgroup's lanes.
template <class T> struct Values {
  unsigned char (*slots)[SLOT_BYTES];
  uint32_t present;
  bool has(unsigned lane) const { return lane < LANES && present >> lane & 1; }
  T get(unsigned lane) const {
    T value;
    memcpy(&value, slots[lane], sizeof(T));
    return value;
  }
  void set(unsigned lane, const T& value) const { memcpy(slots[lane], &value, sizeof(T)); }
};

// All lanes hand over a value; the last one computes, over all of them, what each gets back.
template <class T, class Compute> inline T meet(const T& value, unsigned site, Compute compute) {
  static_assert(sizeof(T) <= SLOT_BYTES);
  Threadgroup& t = now;
  const unsigned me = t.current, own = me % LANES;
  Simdgroup& s = t.simdgroups[me / LANES];
  if (!s.waiting) {
    s.site = site;
    s.trace = t.trace[me];
  } else if (s.site != site) {
    fail("divergence: lanes of one simdgroup wait at the simd operations of lines %u and %u", s.site / 1000, site / 1000);
  } else if (s.trace != t.trace[me]) {
    fail("divergence: lanes of one simdgroup came to the simd operation of line %u by different ways", site / 1000);
  }
  const Values<T> values{s.slots[s.phase], s.present};
  values.set(own, value);
  s.waiting |= 1u << own;
  if (s.waiting == s.present) {
    compute(values);
    if (t.lockstep) s.step[SHARED]++, s.step[DEVICE]++;
    s.waiting = 0;
    s.phase ^= 1;
    if (s.present != 1u << own) make_ready(me / LANES, s.present & ~(1u << own));
  } else {
    run_next(&t.state[me]);
  }
  return values.get(own);
}

inline void simdgroup_barrier(unsigned flags, unsigned site) {
  meet(flags, site, [=](Values<unsigned> values) {
    for (unsigned lane = 0; lane < LANES; lane++)
      if (values.has(lane) && values.get(lane) != flags) fail("lanes give the barrier of line %u different flags", site / 1000);
    for (unsigned kind = 0; kind < 2; kind++)
      if (flags >> kind & 1) now.simdgroups[now.current / LANES].step[kind]++;
  });
}
}  // namespace emu
