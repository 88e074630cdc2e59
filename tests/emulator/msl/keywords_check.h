// Last before a kernel's text that is only checked: address spaces are types' properties, as in Metal.
#pragma once
#define kernel
#define METAL_FUNC inline
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define double double_is_no_metal_type

// (To)from as EMU_POINTER_CAST(To)->*from, which binds as tightly as texts need: the address space has to stay.
template <class To> struct EmuPointerCast;
template <class T> struct EmuDereference {
  template <class From> T& operator->*(From* from) const { return *(EmuPointerCast<T*>{}->*from); }
};
template <class T> struct EmuPointerCast<T*> {
  EmuDereference<T> operator*() const { return {}; }
  template <class From> T* operator->*(From* from) const { return const_cast<T*>(reinterpret_cast<const T*>(from)); }
};
#define EMU_POINTER_CAST(To) EmuPointerCast<To>{}
