// Makes an array without writing it: whoever reads it reads only what was written since.
//
// after  int (8,)                         nothing; kernels have an input
// out    any type, any shape              left as it was allocated
// token  int (1,)                         1, so that the kernel does something
//
// template: none
// grid (1, 1, 1), threadgroup (1, 1, 1)
token[0] = 1;
