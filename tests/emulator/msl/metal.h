// Metal's standard library, for clang on a CPU: what <metal_stdlib> and its parts include here.
#pragma once
#pragma clang attribute push(__attribute__((no_sanitize("thread"))), apply_to = function)
#include "launch.h"
#pragma clang attribute pop
#include "matrix.h"
using namespace metal;
