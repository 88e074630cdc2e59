// Last before a kernel's text that is run: address spaces mean nothing on a CPU.
#pragma once
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define device
#define thread
#define constant const
#define threadgroup
// What translate.py makes of the declaration of a threadgroup variable.
#define EMU_THREADGROUP_VARIABLE(T, name, dimensions) \
  struct name##_tag {}; \
  typedef T name##_type dimensions; \
  name##_type& name = emu::threadgroup_variable<name##_type, name##_tag>(#name)
// And behind that of a variable of unsigned vectors, which the compiler would fill with the bits of small numbers.
#define EMU_UNWRITTEN(name) memset(&name, 0xFF, sizeof name)
