// Scalars, vectors and limits of the Metal Shading Language.
#pragma once
#include <limits>
#include <stddef.h>
#include <stdint.h>
#include <type_traits>

#define __METAL_VERSION__ 320
#define __METAL__ 1
#define __HAVE_BFLOAT__ 1
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

// clang calls this where the processor has no instruction for it, and older compilers' libraries lack it.
extern "C" inline __attribute__((used, weak, no_sanitize("thread"))) bfloat __truncsfbf2(float value) {
  unsigned bits = __builtin_bit_cast(unsigned, value);
  bits = value != value ? bits | 1u << 22 : bits + 0x7fffu + (bits >> 16 & 1);
  return __builtin_bit_cast(bfloat, (unsigned short)(bits >> 16));
}

#define EMU_VECTORS(T) \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
EMU_VECTORS(char)
EMU_VECTORS(uchar)
EMU_VECTORS(short)
EMU_VECTORS(ushort)
EMU_VECTORS(int)
EMU_VECTORS(uint)
EMU_VECTORS(long)
EMU_VECTORS(ulong)
EMU_VECTORS(half)
EMU_VECTORS(bfloat)
EMU_VECTORS(float)

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
typedef ::half half;
typedef ::bfloat bfloat;

namespace detail {
template <class T> struct Vector {
  using Element = T;
  static constexpr int SIZE = 1;
};
template <class T, int N> struct Vector<T __attribute__((ext_vector_type(N)))> {
  using Element = T;
  static constexpr int SIZE = N;
};
template <class T> constexpr bool IS_VECTOR = Vector<T>::SIZE > 1;

template <class V, class A> inline void append(V& vector, int& at, A part) {
  using Element = typename Vector<V>::Element;
  if constexpr (IS_VECTOR<A>)
    for (int k = 0; k < Vector<A>::SIZE; k++) vector[at++] = (Element)part[k];
  else
    vector[at++] = (Element)part;
}
// A vector's constructor: one value for all, a vector to convert, or parts one behind another.
template <class T, int N, class... Parts> inline vec<T, N> make(Parts... parts) {
  static_assert(sizeof...(Parts) == 1 || (Vector<Parts>::SIZE + ... + 0) == N, "wrong number of components");
  vec<T, N> vector;
  int at = 0;
  (append(vector, at, parts), ...);
  for (; at < N; at++) vector[at] = vector[0];
  return vector;
}
}  // namespace detail

template <class T> struct numeric_limits : std::numeric_limits<T> {};
template <> struct numeric_limits<half> {
  static constexpr half infinity() { return (half)INFINITY; }
  static constexpr half quiet_NaN() { return (half)NAN; }
  static constexpr half max() { return (half)65504.0f; }
  static constexpr half lowest() { return (half)-65504.0f; }
};
template <> struct numeric_limits<bfloat> {
  static constexpr bfloat infinity() { return (bfloat)INFINITY; }
  static constexpr bfloat quiet_NaN() { return (bfloat)NAN; }
  static constexpr bfloat max() { return (bfloat)3.38953139e38f; }
  static constexpr bfloat lowest() { return (bfloat)-3.38953139e38f; }
};
using std::bool_constant;
using std::conditional_t;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_floating_point_v;
using std::is_integral_v;
using std::is_same_v;
using std::is_unsigned_v;
using std::true_type;

template <class To, class From> inline To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type between sizes");
  return __builtin_bit_cast(To, value);
}
}  // namespace metal
