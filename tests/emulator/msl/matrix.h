// <metal_simdgroup_matrix>: 8 x 8, two elements of one row per lane, where MLX's own kernels find them on Apple GPUs.
#pragma once
#include "simd.h"

#define EMU_INLINED inline __attribute__((always_inline))

namespace metal {
namespace detail {
constexpr uint matrix_row(uint lane) { return (lane >> 4 & 1) * 4 + (lane >> 1 & 3); }
constexpr uint matrix_column(uint lane) { return (lane >> 3 & 1) * 4 + (lane & 1) * 2; }

template <class A, class B> struct Factors {
  vec<float, 2> sums;
  vec<A, 2> a;
  vec<B, 2> b;
};
// Products in float, added up one after another.
template <class A, class B> EMU_MEETING vec<float, 2> multiplied(vec<A, 2> a, vec<B, 2> b, vec<float, 2> c, uint site) {
  using Lane = Factors<A, B>;
  return emu::meet(Lane{c, a, b}, site, [](emu::Values<Lane> values) __attribute__((no_sanitize("thread"))) {
    float left[8][8], right[8][8];
    for (uint lane = 0; lane < emu::LANES; lane++) {
      const Lane own = values.get(lane);
      const uint row = matrix_row(lane), column = matrix_column(lane);
      for (int j = 0; j < 2; j++) {
        left[row][column + j] = (float)own.a[j];
        right[row][column + j] = (float)own.b[j];
      }
    }
    for (uint lane = 0; lane < emu::LANES; lane++) {
      Lane own = values.get(lane);
      const uint row = matrix_row(lane), column = matrix_column(lane);
      for (int j = 0; j < 2; j++)
        for (int k = 0; k < 8; k++) own.sums[j] += left[row][k] * right[k][column + j];
      values.set(lane, own);
    }
  }).sums;
}
}  // namespace detail

template <class T, int ROWS, int COLUMNS> struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "Metal has 8 x 8 matrices");
  vec<T, 2> elements;
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T value) { elements[0] = elements[1] = value; }
  EMU_INLINED vec<T, 2>& thread_elements() { return elements; }
  EMU_INLINED const vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int ROWS, int COLUMNS = ROWS>
EMU_INLINED simdgroup_matrix<T, ROWS, COLUMNS> make_filled_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, ROWS, COLUMNS>(value);
}

template <class D, class A, class B, class C>
EMU_INLINED void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d,
    const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b,
    const simdgroup_matrix<C, 8, 8>& c,
    EMU_SITE) {
  vec<float, 2> sums;
  sums[0] = (float)c.elements[0];
  sums[1] = (float)c.elements[1];
  sums = detail::multiplied<A, B>(a.elements, b.elements, sums, site);
  d.elements[0] = (D)sums[0];
  d.elements[1] = (D)sums[1];
}
template <class D, class A, class B>
EMU_INLINED void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b, EMU_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8>(0.0f), site);
}

// `origin` is (column, row).
template <class T, class Pointer>
EMU_INLINED void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& d, Pointer from, ulong per_row = 8, ulong2 origin = 0, bool transposed = false, EMU_SITE) {
  emu::mark(site);
  const uint row = detail::matrix_row(emu::lane()), column = detail::matrix_column(emu::lane());
  for (uint j = 0; j < 2; j++) {
    const ulong r = transposed ? column + j : row, c = transposed ? row : column + j;
    d.elements[j] = from[(origin.y + r) * per_row + origin.x + c];
  }
}
template <class T, class Pointer>
EMU_INLINED void simdgroup_store(
    const simdgroup_matrix<T, 8, 8>& d, Pointer to, ulong per_row = 8, ulong2 origin = 0, bool transposed = false, EMU_SITE) {
  emu::mark(site);
  const uint row = detail::matrix_row(emu::lane()), column = detail::matrix_column(emu::lane());
  for (uint j = 0; j < 2; j++) {
    const ulong r = transposed ? column + j : row, c = transposed ? row : column + j;
    to[(origin.y + r) * per_row + origin.x + c] = d.elements[j];
  }
}
}  // namespace metal
