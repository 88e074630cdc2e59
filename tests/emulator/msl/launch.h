// A launch: all threadgroups of a grid, one after another, in one thread of the operating system.
#pragma once
#include "access.h"
#include <signal.h>
#include <sys/time.h>

namespace emu {
inline unsigned allowed_seconds;

inline void on_signal(int number, siginfo_t* info, void*) {
  if (!now.running) {
    signal(number, SIG_DFL);
    return;
  }
  if (number == SIGVTALRM) fail("no end after %u s: thread %u is still running", allowed_seconds, now.current);
  if (number == SIGSEGV || number == SIGBUS)  fail_at(info->si_addr);
  fail("undefined behaviour in thread %u: an index outside an array, a misaligned vector, an overflow, a shift or a division "
       "by zero", now.current);
}

struct Signals {
  static void set_timer(unsigned seconds) {
    const struct itimerval limit {{0, 0}, {(time_t)seconds, 0}};
    setitimer(ITIMER_VIRTUAL, &limit, nullptr);
  }
  static constexpr int NUMBERS[5] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGVTALRM};
  struct sigaction before[5];
  Signals() {
    struct sigaction action {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int i = 0; i < 5; i++) sigaction(NUMBERS[i], &action, &before[i]);
    set_timer(allowed_seconds);
  }
  ~Signals() {
    set_timer(0);
    for (int i = 0; i < 5; i++) sigaction(NUMBERS[i], &before[i], nullptr);
  }
};

inline void run_threadgroup(uint64_t index) {
  Threadgroup& t = now;
  t.place = {unsigned(index % t.groups.x), unsigned(index / t.groups.x % t.groups.y), unsigned(index / t.groups.x / t.groups.y)};
  t.left = t.threads;
  t.at_barrier = 0;
  t.any_returned = false;
  t.epoch[SHARED] = t.epoch[DEVICE] = t.first_epoch = ++last_epoch;
  memset(shared_memory, 0xFF, SHARED_BYTES);  // not-a-number in each float format
  for (unsigned group = 0; group * LANES < t.threads; group++) {
    Simdgroup& s = t.simdgroups[group];
    const unsigned lanes = t.threads - group * LANES < LANES ? t.threads - group * LANES : LANES;
    s.present = lanes == LANES ? ~0u : (1u << lanes) - 1;
    s.waiting = s.phase = 0;
    s.step[SHARED] = s.step[DEVICE] = 0;
    make_ready(group, s.present);
  }
  for (unsigned i = 0; i < t.threads; i++) {
    t.returned[i] = false;
    t.trace[i] = 0;
    t.state[i] = new_fiber(t.stacks + (i + 1) * t.stack_bytes, thread_main);
  }
  t.running = true;
  run_next(&t.scheduler);
  t.running = false;
}

// The order of threadgroups: up, down, or in steps that come to each of them once.
inline uint64_t nth(uint64_t i, uint64_t total) {
  if (now.order == ASCENDING) return i;
  if (now.order == DESCENDING) return total - 1 - i;
  constexpr uint64_t PRIME = 4294967311;
  return (i % total * (PRIME % total) + total / 2) % total;
}

inline void run_grid() {
  const uint64_t total = (uint64_t)now.groups.x * now.groups.y * now.groups.z;
  ++launch_number;
  shared_used = num_variables = 0;
  now.message[0] = 0;
  now.ready_groups = 0;
  memset(now.ready, 0, sizeof now.ready);
  fault_address = nullptr;
  const Signals signals;
  for (uint64_t i = 0; i < total && !now.message[0]; i++) run_threadgroup(nth(i, total));
}
}  // namespace emu

// What Python hands over (run.py, `_Launch`).
struct EmuLaunch {
  emu::Size grid, threadgroup;
  int order;
  int lockstep;
  unsigned num_buffers;
  uint64_t seed;
  unsigned most_seconds;  // of processor time
  char* stacks;
  unsigned char* shared;
  uint64_t stack_bytes;
  void** pointers;
  emu::Buffer* buffers;  // of the same; cells: zeroed, or none for those that are not looked at for races
  const void* fault;
  char message[emu::MESSAGE_BYTES];
};

inline void emu_launch(EmuLaunch& launch, void (*body)(void*, unsigned)) {
  emu::Threadgroup& t = emu::now;
  t.grid = launch.grid;
  t.size = launch.threadgroup;
  t.groups = {t.grid.x / t.size.x, t.grid.y / t.size.y, t.grid.z / t.size.z};
  t.threads = t.size.count();
  t.order = (emu::Order)launch.order;
  t.lockstep = launch.lockstep;
  t.random = launch.seed * 2 + 88172645463325253ull;
  t.stacks = launch.stacks;
  t.stack_bytes = launch.stack_bytes;
  emu::shared_memory = launch.shared;
  t.body = body;
  t.arguments = launch.pointers;
  emu::allowed_seconds = launch.most_seconds;
  emu::num_buffers = launch.num_buffers;
  memcpy(emu::buffers, launch.buffers, launch.num_buffers * sizeof(emu::Buffer));
  emu::run_grid();
  launch.fault = emu::fault_address;
  memcpy(launch.message, t.message, sizeof t.message);
}
