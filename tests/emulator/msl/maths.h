// Functions of <metal_math>, <metal_common> and <metal_integer>. Everything is computed in float and rounded to the
// argument's type, and `fast` is as exact as `precise`: the emulator does not show what fast functions lose.
#pragma once
#include "types.h"

namespace metal {
#define EMU_FUNCTION(name, expression) \
  template <class T> inline T name(T value) { \
    if constexpr (detail::IS_VECTOR<T>) { \
      T result; \
      for (int i = 0; i < detail::Vector<T>::SIZE; i++) result[i] = name((typename detail::Vector<T>::Element)value[i]); \
      return result; \
    } else { \
      static_assert(!std::is_integral_v<T>, #name " of an integer is ambiguous in Metal"); \
      const float x = (float)value; \
      return (T)(expression); \
    } \
  }
#define EMU_FUNCTIONS \
  EMU_FUNCTION(exp, __builtin_expf(x)) \
  EMU_FUNCTION(exp2, __builtin_exp2f(x)) \
  EMU_FUNCTION(log, __builtin_logf(x)) \
  EMU_FUNCTION(log2, __builtin_log2f(x)) \
  EMU_FUNCTION(sqrt, __builtin_sqrtf(x)) \
  EMU_FUNCTION(rsqrt, 1.0f / __builtin_sqrtf(x)) \
  EMU_FUNCTION(tanh, __builtin_tanhf(x)) \
  EMU_FUNCTION(sin, __builtin_sinf(x)) \
  EMU_FUNCTION(cos, __builtin_cosf(x)) \
  EMU_FUNCTION(floor, __builtin_floorf(x)) \
  EMU_FUNCTION(ceil, __builtin_ceilf(x)) \
  EMU_FUNCTION(round, __builtin_roundf(x)) \
  EMU_FUNCTION(rint, __builtin_rintf(x)) \
  EMU_FUNCTION(trunc, __builtin_truncf(x)) \
  EMU_FUNCTION(fabs, __builtin_fabsf(x))
EMU_FUNCTIONS
namespace precise {
EMU_FUNCTIONS
}
namespace fast {
EMU_FUNCTIONS
}

// As strict as Metal: both arguments are of one type. Of a number and a not-a-number they give the number.
#define EMU_CHOICE(name, better, of_floats) \
  template <class T> inline T name(T a, T b) { \
    if constexpr (detail::IS_VECTOR<T>) { \
      T result; \
      for (int i = 0; i < detail::Vector<T>::SIZE; i++) \
        result[i] = name((typename detail::Vector<T>::Element)a[i], (typename detail::Vector<T>::Element)b[i]); \
      return result; \
    } else if constexpr (std::is_integral_v<T>) { \
      return better ? a : b; \
    } else { \
      return (T)of_floats((float)a, (float)b); \
    } \
  }
EMU_CHOICE(max, b < a, __builtin_fmaxf)
EMU_CHOICE(min, a < b, __builtin_fminf)
template <class T> inline T clamp(T value, T lowest, T highest) { return min(max(value, lowest), highest); }
template <class T> inline T abs(T value) { return value < (T)0 ? -value : value; }
template <class T> inline T fma(T a, T b, T c) { return (T)__builtin_fmaf((float)a, (float)b, (float)c); }
template <class T> inline T select(T no, T yes, bool condition) { return condition ? yes : no; }
inline float pow(float base, float exponent) { return __builtin_powf(base, exponent); }
inline bool isnan(float value) { return value != value; }
inline bool isinf(float value) { return __builtin_isinf(value); }
inline int popcount(uint value) { return __builtin_popcount(value); }
inline uint clz(uint value) { return value ? __builtin_clz(value) : 32; }
inline uint ctz(uint value) { return value ? __builtin_ctz(value) : 32; }
template <class V> inline typename detail::Vector<V>::Element dot(V a, V b) {
  typename detail::Vector<V>::Element sum = 0;
  for (int i = 0; i < detail::Vector<V>::SIZE; i++) sum += a[i] * b[i];
  return sum;
}
}  // namespace metal
