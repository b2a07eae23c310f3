#include "primitives.h"
#include "../../../kernels/cuda_ops/stream.cu"
#include "blocks.h"
