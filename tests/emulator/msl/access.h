// Every access of memory that threads share is looked at: is it in bounds, and is it ordered with the others' accesses?
//
// The compiler announces each access through the hooks of its thread sanitizer; there is no other part of that here. Two
// accesses of one place by two threads, at least one of them a write, are a race unless a barrier with the right flags
// stands between them: threadgroup_barrier for any two threads of a threadgroup, simdgroup_barrier for two lanes of a
// simdgroup, nothing for two threadgroups. Simd operations order no memory, unless a launch asks for it (`lockstep`). This
// holds in whatever order threads ran.
#pragma once
#include "threadgroup.h"
#include <stdlib.h>

namespace emu {
constexpr unsigned CELL_BYTES = 2;  // that share a cell: no kernel writes single bytes
constexpr unsigned MOST_BUFFERS = 32, MOST_VARIABLES = 64;

struct Access {
  uint32_t epoch, step;
  uint16_t thread;
  bool several_lanes, several_groups;
};
struct Cell {
  Access read, write;
};
struct Buffer {  // an argument
  char *begin, *end, *mapped_begin, *mapped_end;
  Cell* cells;
};
struct Variable {
  const char* name;
  unsigned begin, end;
};
inline unsigned char* shared_memory;  // SHARED_BYTES, 64-byte aligned
inline Cell shared_cells[SHARED_BYTES / CELL_BYTES];
inline Buffer buffers[MOST_BUFFERS];
inline unsigned num_buffers;
inline Variable variables[MOST_VARIABLES];
inline unsigned num_variables, shared_used;

// Where an instance of a threadgroup variable lies: the same place for all threads of a launch.
inline unsigned new_variable(const char* name, unsigned bytes) {
  const unsigned begin = (shared_used + 15) & ~15u;
  shared_used = begin + bytes;
  if (shared_used > SHARED_BYTES) fail("threadgroup memory of %u bytes is over %u", shared_used, SHARED_BYTES);
  if (num_variables == MOST_VARIABLES) fail("more than %u threadgroup variables", MOST_VARIABLES);
  variables[num_variables++] = {name, begin, shared_used};
  return begin;
}
inline uint64_t launch_number;
template <class Array, class Tag> inline Array& threadgroup_variable(const char* name) {
  static uint64_t seen;
  static unsigned begin;
  if (seen != launch_number) {
    seen = launch_number;
    begin = new_variable(name, sizeof(Array));
  }
  return *(Array*)(shared_memory + begin);
}

// Whether `past` is ordered before what the current thread does now.
inline bool ordered(const Access& past, unsigned kind, const Simdgroup& own) {
  const Threadgroup& t = now;
  if (!past.epoch || (kind == SHARED && past.epoch < t.first_epoch)) return true;
  if (past.epoch < t.first_epoch) return false;  // another threadgroup's
  if (past.epoch < t.epoch[kind]) return true;
  if (past.several_groups || past.thread / LANES != t.current / LANES) return false;
  return past.step != own.step[kind] || (!past.several_lanes && past.thread == t.current);
}

// Returns the other thread of a race, or -1.
inline int touch(Cell& cell, unsigned kind, bool write) {
  Threadgroup& t = now;
  const Simdgroup& own = t.simdgroups[t.current / LANES];
  if (!ordered(cell.write, kind, own)) return cell.write.thread;
  if (write && !ordered(cell.read, kind, own)) return cell.read.thread;
  Access& last = write ? cell.write : cell.read;
  const bool fresh = write || last.epoch < t.first_epoch || last.epoch < t.epoch[kind];
  const bool same_group = last.thread / LANES == t.current / LANES;
  const bool several_groups = !fresh && (last.several_groups || !same_group);
  const bool same_step = !fresh && same_group && last.step == own.step[kind];
  const bool several_lanes = same_step && (last.several_lanes || last.thread != t.current);
  last = {t.epoch[kind], own.step[kind], (uint16_t)t.current, several_lanes, several_groups};
  return -1;
}

inline const void* fault_address;
[[noreturn]] inline void fail_at(const void* address) {
  fault_address = address;
  fail("bad access of thread %u", now.current);
}

inline const char* variable_at(unsigned offset, unsigned bytes) {
  for (unsigned i = 0; i < num_variables; i++)
    if (offset >= variables[i].begin && offset + bytes <= variables[i].end) return variables[i].name;
  return nullptr;
}

constexpr const char* RACE_OF_BUFFER =
    "race: no order between the accesses of threads %u and %u, of one or of two threadgroups, of buffer %u";

inline void on_access(const void* address, size_t bytes, bool write, size_t alignment = 1) {
  if (!now.running || !bytes) return;
  if ((uintptr_t)address % alignment) fail("a misaligned access of %u bytes by thread %u", bytes, now.current);
  const size_t offset = (const unsigned char*)address - shared_memory;
  if (offset < SHARED_BYTES) {
    const char* name = variable_at(offset, bytes);
    if (!name) fail("bad access of thread %u: a pointer misses its threadgroup variable", now.current);
    for (unsigned i = offset / CELL_BYTES; i <= (offset + bytes - 1) / CELL_BYTES; i++) {
      const int other = touch(shared_cells[i], SHARED, write);
      if (other >= 0) fail("race: no barrier between the accesses of threads %u and %u of ", other, now.current, 0, name);
    }
    return;
  }
  for (unsigned b = 0; b < num_buffers; b++) {
    Buffer& buffer = buffers[b];
    const char* at = (const char*)address;
    if (at < buffer.mapped_begin || at >= buffer.mapped_end) continue;
    if (at < buffer.begin || at + bytes > buffer.end) fail_at(address);
    if (!buffer.cells) return;
    for (size_t i = (at - buffer.begin) / CELL_BYTES; i <= (at + bytes - 1 - buffer.begin) / CELL_BYTES; i++) {
      const int other = touch(buffer.cells[i], DEVICE, write);
      if (other >= 0) fail(RACE_OF_BUFFER, other, now.current, b);
    }
    return;
  }
  const char* stack = now.stacks + now.current * now.stack_bytes;
  if (write && ((const char*)address < stack || (const char*)address >= stack + now.stack_bytes))
    fail_at(address);
}
}  // namespace emu

#define EMU_HOOK(bytes) \
  extern "C" inline __attribute__((used)) void __tsan_read##bytes(void* p) { emu::on_access(p, bytes, false, bytes); } \
  extern "C" inline __attribute__((used)) void __tsan_write##bytes(void* p) { emu::on_access(p, bytes, true, bytes); } \
  extern "C" inline __attribute__((used)) void __tsan_unaligned_read##bytes(void* p) { emu::on_access(p, bytes, false); } \
  extern "C" inline __attribute__((used)) void __tsan_unaligned_write##bytes(void* p) { emu::on_access(p, bytes, true); }
EMU_HOOK(1)
EMU_HOOK(2)
EMU_HOOK(4)
EMU_HOOK(8)
EMU_HOOK(16)
extern "C" inline __attribute__((used)) void __tsan_init() {}
extern "C" inline __attribute__((used)) void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  emu::on_access(from, bytes, false);
  emu::on_access(to, bytes, true);
  return memcpy(to, from, bytes);
}
extern "C" inline __attribute__((used)) void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  emu::on_access(from, bytes, false);
  emu::on_access(to, bytes, true);
  return memmove(to, from, bytes);
}
extern "C" inline __attribute__((used)) void* __tsan_memset(void* to, int value, size_t bytes) {
  emu::on_access(to, bytes, true);
  return memset(to, value, bytes);
}
