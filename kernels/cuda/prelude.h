// Metal's words in CUDA: stands before common.h and each kernel function where mx.fast.cuda_kernel compiles a body.
//
// A simdgroup is a warp, a threadgroup a block. MLX includes cuda_fp16.h, cuda_bf16.h and cooperative_groups.h before
// this, nothing behind it, and compiles functions without attributes, as those of common.h, for the device. What bodies
// use, or are likely to, is here: tests/kernels/test_cuda_text.py tells what is missing.

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __nv_bfloat16 bfloat;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

template <class To, class From> __device__ __forceinline__ To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- Barriers ----

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
__device__ __forceinline__ void threadgroup_barrier(mem_flags) { __syncthreads(); }
__device__ __forceinline__ void simdgroup_barrier(mem_flags) { __syncwarp(); }

// ---- Across a simdgroup. All lanes take part, as Metal demands of those that are read from. ----

#define MSL_ALL_LANES 0xffffffffu
template <class T> __device__ __forceinline__ T simd_shuffle(T value, ushort lane) {
  return __shfl_sync(MSL_ALL_LANES, value, lane);
}
template <class T> __device__ __forceinline__ T simd_broadcast(T value, ushort lane) {
  return __shfl_sync(MSL_ALL_LANES, value, lane);
}
template <class T> __device__ __forceinline__ T simd_shuffle_xor(T value, ushort mask) {
  return __shfl_xor_sync(MSL_ALL_LANES, value, mask);
}
template <class T> __device__ __forceinline__ T simd_shuffle_down(T value, ushort delta) {
  return __shfl_down_sync(MSL_ALL_LANES, value, delta);
}
template <class T> __device__ __forceinline__ T simd_shuffle_up(T value, ushort delta) {
  return __shfl_up_sync(MSL_ALL_LANES, value, delta);
}
template <class T> __device__ __forceinline__ T simd_sum(T value) {
#pragma unroll
  for (int d = 16; d; d >>= 1) value += __shfl_xor_sync(MSL_ALL_LANES, value, d);
  return value;
}
template <class T> __device__ __forceinline__ T simd_max(T value) {
#pragma unroll
  for (int d = 16; d; d >>= 1) value = ::max(value, __shfl_xor_sync(MSL_ALL_LANES, value, d));
  return value;
}
template <class T> __device__ __forceinline__ T simd_min(T value) {
#pragma unroll
  for (int d = 16; d; d >>= 1) value = ::min(value, __shfl_xor_sync(MSL_ALL_LANES, value, d));
  return value;
}
__device__ __forceinline__ bool simd_any(bool value) { return __any_sync(MSL_ALL_LANES, value); }
__device__ __forceinline__ bool simd_all(bool value) { return __all_sync(MSL_ALL_LANES, value); }
struct msl_vote {
  ulong lanes;
  __device__ explicit operator ulong() const { return lanes; }
};
__device__ __forceinline__ msl_vote simd_ballot(bool value) { return {__ballot_sync(MSL_ALL_LANES, value)}; }

// ---- Mathematics. `fast` may lose the last bits and denormals, as Metal's does. ----

namespace metal {
__device__ __forceinline__ float exp(float x) { return ::expf(x); }
__device__ __forceinline__ float exp2(float x) { return ::exp2f(x); }
__device__ __forceinline__ float log(float x) { return ::logf(x); }
__device__ __forceinline__ float log2(float x) { return ::log2f(x); }
__device__ __forceinline__ float sqrt(float x) { return ::sqrtf(x); }
__device__ __forceinline__ float rsqrt(float x) { return ::rsqrtf(x); }
__device__ __forceinline__ float tanh(float x) { return ::tanhf(x); }
__device__ __forceinline__ float abs(float x) { return ::fabsf(x); }
template <class T> __device__ __forceinline__ T max(T a, T b) { return ::max(a, b); }
template <class T> __device__ __forceinline__ T min(T a, T b) { return ::min(a, b); }
namespace precise {
using metal::exp;
using metal::exp2;
using metal::log;
using metal::sqrt;
using metal::tanh;
}  // namespace precise
namespace fast {
__device__ __forceinline__ float exp(float x) { return ::__expf(x); }
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log(float x) { return ::__logf(x); }
}  // namespace fast
}  // namespace metal

// ---- Where a thread is ----

struct msl_uint3 {
  uint x, y, z;
};
#define threadgroup_position_in_grid (msl_uint3{blockIdx.x, blockIdx.y, blockIdx.z})
#define threadgroups_per_grid (msl_uint3{gridDim.x, gridDim.y, gridDim.z})
#define threads_per_threadgroup (msl_uint3{blockDim.x, blockDim.y, blockDim.z})
#define threads_per_grid (msl_uint3{gridDim.x * blockDim.x, gridDim.y * blockDim.y, gridDim.z * blockDim.z})
#define thread_position_in_threadgroup (msl_uint3{threadIdx.x, threadIdx.y, threadIdx.z})
#define thread_position_in_grid \
  (msl_uint3{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \
             blockIdx.z * blockDim.z + threadIdx.z})
#define thread_index_in_threadgroup (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))
#define thread_index_in_simdgroup (thread_index_in_threadgroup & 31u)
#define simdgroup_index_in_threadgroup (thread_index_in_threadgroup >> 5)
#define simdgroups_per_threadgroup ((blockDim.x * blockDim.y * blockDim.z + 31u) >> 5)
#define threads_per_simdgroup 32u

// CUDA's own ulong2 has no constructor.
struct msl_ulong2 {
  ulong x, y;
  __device__ msl_ulong2(ulong x, ulong y) : x(x), y(y) {}
};
#define ulong2 msl_ulong2

// ---- 8 x 8 matrices of a simdgroup, by tensor cores ----
//
// A lane holds (row, column) and (row, column + 1) where mma.sync has them in its results and, for 16-bit elements, in
// its left operand: row lane / 4, column lane % 4 * 2. movmatrix turns that into the right operand (PTX ISA, "Matrix
// fragments for mma.m16n8k8"). Apple GPUs share the elements out otherwise; common.h's MATRIX_ROW hides it.
//
// A matrix remembers its form as a right operand, so that several products turn it once, and a transposed load, which
// reads that very form, not at all. `turned` is known wherever loops are unrolled: the compiler decides, not the GPU.
#define MATRIX_ROW(lane) ((lane) >> 2)
#define MATRIX_COLUMN(lane) (((lane) & 3) * 2)
#define MATRIX_ROW_BIT_0 1
#define MATRIX_ROW_BIT_1 2

template <class T, int COLUMNS, int ROWS> struct simdgroup_matrix {
  static_assert(COLUMNS == 8 && ROWS == 8, "Metal has 8 x 8 only");
  T elements[2];
  mutable uint right;
  mutable bool turned = false;
  __device__ simdgroup_matrix() {}
  __device__ explicit simdgroup_matrix(T value) : elements{value, value} {}
  __device__ T (&thread_elements())[2] {
    turned = false;
    return elements;
  }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<__half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<__nv_bfloat16, 8, 8> simdgroup_bfloat8x8;

template <class T, int COLUMNS, int ROWS = COLUMNS>
__device__ __forceinline__ simdgroup_matrix<T, COLUMNS, ROWS> make_filled_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, COLUMNS, ROWS>(value);
}

__device__ __forceinline__ uint msl_pair(__half a, __half b) {
  return __half_as_ushort(a) | uint(__half_as_ushort(b)) << 16;
}
__device__ __forceinline__ uint msl_pair(__nv_bfloat16 a, __nv_bfloat16 b) {
  return __bfloat16_as_ushort(a) | uint(__bfloat16_as_ushort(b)) << 16;
}
__device__ __forceinline__ uint msl_pair(float, float) { return 0; }

// Element (row, column) of the matrix is at p[row * stride + column], of a transposed one at p[column * stride + row].
template <class T, class P>
__device__ __forceinline__ void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& to, P p, ulong stride = 8, ulong2 origin = ulong2(0, 0), bool transposed = false) {
  const ulong row = MATRIX_ROW(thread_index_in_simdgroup);
  const ulong column = MATRIX_COLUMN(thread_index_in_simdgroup);
  p += origin.y * stride + origin.x;
  to.elements[0] = p[transposed ? column * stride + row : row * stride + column];
  to.elements[1] = p[transposed ? (column + 1) * stride + row : row * stride + column + 1];
  to.turned = transposed && sizeof(T) == 2;
  if (to.turned) to.right = msl_pair(p[row * stride + column], p[row * stride + column + 1]);
}
template <class T, class P>
__device__ __forceinline__ void simdgroup_store(
    const simdgroup_matrix<T, 8, 8>& from, P p, ulong stride = 8, ulong2 origin = ulong2(0, 0)) {
  const ulong row = MATRIX_ROW(thread_index_in_simdgroup);
  const ulong column = MATRIX_COLUMN(thread_index_in_simdgroup);
  p += (row + origin.y) * stride + column + origin.x;
  p[0] = from.elements[0];
  p[1] = from.elements[1];
}

// Rows 8 to 15 of the 16 x 8 product are zeros, and dropped.
#define MSL_MMA(TYPE) \
  asm volatile( \
      "{.reg .f32 x, y;\n" \
      "mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, x, y}, {%2, %3}, {%4}, {%0, %1, %5, %5};}" \
      : "+f"(sums[0]), "+f"(sums[1]) \
      : "r"(left), "r"(0), "r"(right), "f"(0.0f))
__device__ __forceinline__ void msl_mma(float (&sums)[2], uint left, uint right, __half) { MSL_MMA("f16"); }
__device__ __forceinline__ void msl_mma(float (&sums)[2], uint left, uint right, __nv_bfloat16) { MSL_MMA("bf16"); }

// Sums in float32. A left operand of float32 is rounded to the right one's type.
template <class A, class B>
__device__ __forceinline__ void msl_product(float (&sums)[2], const A (&a)[2], const simdgroup_matrix<B, 8, 8>& b) {
  if (!b.turned) {
    const uint pair = msl_pair(b.elements[0], b.elements[1]);
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b.right) : "r"(pair));
    b.turned = true;
  }
  msl_mma(sums, msl_pair(B(float(a[0])), B(float(a[1]))), b.right, B(0.0f));
}
// float32 by shuffles, for no tensor core keeps all its bits. Not unrolled: a kernel has hundreds of these.
template <class A>
__device__ __forceinline__ void msl_product(float (&sums)[2], const A (&a)[2], const simdgroup_matrix<float, 8, 8>& b) {
  const uint lane = thread_index_in_simdgroup;
#pragma unroll 1
  for (uint k = 0; k < 8; k += 2) {
    const float a0 = simd_shuffle(float(a[0]), (lane & 28u) | k >> 1);
    const float a1 = simd_shuffle(float(a[1]), (lane & 28u) | k >> 1);
    const uint upper = k * 4 | (lane & 3u);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      sums[j] += a0 * simd_shuffle(b.elements[j], upper);
      sums[j] += a1 * simd_shuffle(b.elements[j], upper + 4);
    }
  }
}
template <class D, class A, class B, class C>
__device__ __forceinline__ void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d,
    const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b,
    const simdgroup_matrix<C, 8, 8>& c) {
  float sums[2] = {float(c.elements[0]), float(c.elements[1])};
  msl_product(sums, a.elements, b);
  d.elements[0] = D(sums[0]);
  d.elements[1] = D(sums[1]);
  d.turned = false;
}
template <class D, class A, class B>
__device__ __forceinline__ void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a, const simdgroup_matrix<B, 8, 8>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}

// ---- Address spaces, which CUDA finds out by itself (threadgroup variables: launch.cuda_body) ----

#define device
#define constant const
#define thread
#define threadgroup
