// All kernels as one program, which is compiled to one file for each architecture.

#include "quantize.cu"
#include "unpack.cu"
