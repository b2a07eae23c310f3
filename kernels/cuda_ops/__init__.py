"""CUDA C++ for decode with many tenants; its Triton twin is `kernels.triton_ops.batch`."""
