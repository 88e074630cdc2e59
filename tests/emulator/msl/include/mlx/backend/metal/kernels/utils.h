// In place of MLX's file of this name, which MLX puts before every kernel: the part of it that kernels use.
#pragma once
#include <metal_stdlib>
typedef bfloat bfloat16_t;
typedef half float16_t;

template <typename U> struct Limits {
  static constexpr U max = metal::numeric_limits<U>::max(), min = metal::numeric_limits<U>::lowest();
  static constexpr U finite_max = max, finite_min = min;
};
template <typename U> struct FloatLimits {
  static constexpr U max = metal::numeric_limits<U>::infinity(), min = -metal::numeric_limits<U>::infinity();
  static constexpr U finite_max = metal::numeric_limits<U>::max(), finite_min = metal::numeric_limits<U>::lowest();
};
template <> struct Limits<float> : FloatLimits<float> {};
template <> struct Limits<half> : FloatLimits<half> {};
template <> struct Limits<bfloat> : FloatLimits<bfloat> {};
