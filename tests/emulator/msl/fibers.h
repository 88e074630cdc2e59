// Fibers: stacks of their own within one thread of the operating system, left and entered by emu_switch.
#pragma once
#include <stdint.h>
#include <string.h>

extern "C" void emu_switch(void** left, void* entered) asm("emu_switch");

namespace emu {
#if defined(__x86_64__)
asm(R"(.text
.globl emu_switch
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi); movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
// The state that emu_switch enters `function` from, on the stack that ends at `top`.
inline void* new_fiber(char* top, void (*function)()) {
  void** state = (void**)((uintptr_t)top & ~uintptr_t(15));
  *--state = nullptr;  // as if called: 8 bytes off the alignment of 16
  *--state = (void*)function;
  for (int i = 0; i < 6; i++) *--state = nullptr;
  return state;
}
#elif defined(__aarch64__)
// One instruction a line: to Apple's assembler for arm64 a semicolon begins a comment.
asm(R"(.text
.globl emu_switch
.p2align 2
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
inline void* new_fiber(char* top, void (*function)()) {
  char* state = (char*)((uintptr_t)top & ~uintptr_t(15)) - 160;
  memset(state, 0, 160);
  ((void**)state)[11] = (void*)function;
  return state;
}
#else
#error "the emulator knows x86-64 and arm64"
#endif
}  // namespace emu
