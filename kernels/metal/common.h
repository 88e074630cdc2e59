// Stands before every kernel function, on Metal, on the emulator and (behind cuda/prelude.h) on CUDA.

// Elements of 16 bytes that were loaded at once: element i of the 16 / sizeof(T) in `raw`, as float.
template <typename T> struct PackedWord;
template <> struct PackedWord<float> {
  static inline float get(uint word, int) { return as_type<float>(word); }
};
template <> struct PackedWord<half> {
  static inline float get(uint word, int i) { return float(as_type<half>(ushort(i ? word >> 16 : word & 0xffffu))); }
};
template <> struct PackedWord<bfloat> {
  static inline float get(uint word, int i) { return as_type<float>(i ? word & 0xffff0000u : word << 16); }
};
template <typename T> inline float packed_element(uint4 raw, int i) {
  const int at = sizeof(T) == 4 ? i : i / 2;
  return PackedWord<T>::get(at == 0 ? raw.x : at == 1 ? raw.y : at == 2 ? raw.z : raw.w, i & 1);
}

// Which elements of an 8 x 8 simdgroup_matrix a lane holds: (row, column) and (row, column + 1), as on Apple GPUs. The lanes
// of one row differ in bits MATRIX_ROW_BIT_0 and _1. CUDA's prelude may hold them otherwise, and then defines these.
#ifndef MATRIX_ROW
#define MATRIX_ROW(lane) (((lane) >> 4 & 1) * 4 + ((lane) >> 1 & 3))
#define MATRIX_COLUMN(lane) (((lane) >> 3 & 1) * 4 + ((lane) & 1) * 2)
#define MATRIX_ROW_BIT_0 1
#define MATRIX_ROW_BIT_1 8
#endif
