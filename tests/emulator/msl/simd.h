// Barriers and functions of <metal_simdgroup>. A call's place in the text, its "site", comes as a default argument.
#pragma once
#include "maths.h"
#include "threadgroup.h"

#define EMU_SITE uint site = __builtin_LINE() * 1000 + __builtin_COLUMN()
#define EMU_MEETING __attribute__((noinline, no_sanitize("thread"))) inline

namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_threadgroup = 1, mem_device = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

EMU_MEETING void threadgroup_barrier(mem_flags flags, EMU_SITE) { emu::barrier(uint(flags), site); }
EMU_MEETING void simdgroup_barrier(mem_flags flags, EMU_SITE) { emu::simdgroup_barrier(uint(flags), site); }

// Reductions: every lane gets the result over the lanes that there are.
#define EMU_REDUCTION(name, joined) \
  template <class T> EMU_MEETING T name(T value, EMU_SITE) { \
    return emu::meet(value, site, [](emu::Values<T> values) __attribute__((no_sanitize("thread"))) { \
      T a = values.get(0); \
      for (uint lane = 1; lane < emu::LANES; lane++) { \
        if (!values.has(lane)) continue; \
        const T b = values.get(lane); \
        a = joined; \
      } \
      for (uint lane = 0; lane < emu::LANES; lane++) values.set(lane, a); \
    }); \
  }
EMU_REDUCTION(simd_sum, T(a + b))
EMU_REDUCTION(simd_product, T(a* b))
EMU_REDUCTION(simd_max, max(a, b))
EMU_REDUCTION(simd_min, min(a, b))
EMU_REDUCTION(simd_any, a || b)
EMU_REDUCTION(simd_all, a&& b)

// Shuffles: a lane gets the value of another, which there has to be; up and down a lane at the end keeps its own.
namespace detail {
template <class T, class From> inline T shuffled(T value, uint site, uint line_of_missing, From from) {
  struct Asked {
    T value;
    uint lane;
  };
  const Asked asked{value, from(emu::lane())};
  return emu::meet(asked, site, [=](emu::Values<Asked> values) __attribute__((no_sanitize("thread"))) {
    T results[emu::LANES];
    for (uint lane = 0; lane < emu::LANES; lane++) {
      if (!values.has(lane)) continue;
      const uint other = values.get(lane).lane;
      if (!values.has(other)) emu::fail("a shuffle in line %u reads lane %u, which there is not", line_of_missing, other);
      results[lane] = values.get(other).value;
    }
    for (uint lane = 0; lane < emu::LANES; lane++) values.set(lane, {results[lane], 0});
  }).value;
}
}  // namespace detail
#define EMU_SHUFFLE(name, other) \
  template <class T> EMU_MEETING T name(T value, ushort n, EMU_SITE) { \
    return detail::shuffled(value, site, site / 1000, [=](uint lane) { return uint(other); }); \
  }
EMU_SHUFFLE(simd_shuffle, (void(lane), n))
EMU_SHUFFLE(simd_shuffle_xor, lane ^ n)
EMU_SHUFFLE(simd_shuffle_down, lane + n < emu::LANES ? lane + n : lane)
EMU_SHUFFLE(simd_shuffle_up, lane < n ? lane : lane - n)
EMU_SHUFFLE(simd_broadcast, (void(lane), n))
template <class T> EMU_MEETING T simd_broadcast_first(T value, EMU_SITE) {
  return detail::shuffled(value, site, site / 1000, [](uint) { return 0u; });
}
template <class T> EMU_MEETING T simd_prefix_inclusive_sum(T value, EMU_SITE) {
  return emu::meet(value, site, [](emu::Values<T> values) {
    T sum = values.get(0);
    for (uint lane = 1; lane < emu::LANES && values.has(lane); lane++) values.set(lane, sum += values.get(lane));
  });
}
}  // namespace metal
