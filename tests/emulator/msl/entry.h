// First behind a kernel's text: how its arguments are made of pointers and of the thread's place.
#pragma once
#undef kernel
#undef device
#undef thread
#undef constant
#undef threadgroup

struct EmuPointer {
  void* address;
  template <class T> operator T*() const { return (T*)address; }
};
struct EmuReference {
  void* address;
  template <class T> operator const T&() const { return *(const T*)address; }
};
// Attributes such as thread_position_in_grid may be declared with one, two or three components.
struct EmuPlace {
  unsigned x, y, z;
  operator unsigned() const { return x; }
  operator metal::vec<unsigned, 2>() const { return metal::detail::make<unsigned, 2>(x, y); }
  operator metal::vec<unsigned, 3>() const { return metal::detail::make<unsigned, 3>(x, y, z); }
};
inline EmuPlace emu_place(const emu::Size& size) { return {size.x, size.y, size.z}; }
inline EmuPlace emu_local(unsigned thread) {
  const emu::Size& size = emu::now.size;
  return {thread % size.x, thread / size.x % size.y, thread / (size.x * size.y)};
}
inline EmuPlace emu_global(unsigned thread) {
  const emu::Size &size = emu::now.size, &place = emu::now.place;
  const EmuPlace local = emu_local(thread);
  return {place.x * size.x + local.x, place.y * size.y + local.y, place.z * size.z + local.z};
}
