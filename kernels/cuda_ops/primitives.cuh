// Instructions that stream.cu is written in; a test compiles stream.cu for a CPU with its own.

typedef long long i64;
typedef unsigned int u32;

#define EVERY_LANE 0xFFFFFFFFu

__device__ __forceinline__ int thread_number() { return threadIdx.x; }
__device__ __forceinline__ int block_number() { return blockIdx.x; }
__device__ __forceinline__ int n_blocks() { return gridDim.x; }

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ int shuffle(int value, int lane) {
  return __shfl_sync(EVERY_LANE, value, lane);
}
__device__ __forceinline__ int shuffle_up(int value, int distance) {
  return __shfl_up_sync(EVERY_LANE, value, distance);
}
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(EVERY_LANE, value, mask);
}
__device__ __forceinline__ u32 vote(bool value) { return __ballot_sync(EVERY_LANE, value); }
__device__ __forceinline__ int count_bits(u32 value) { return __popc(value); }
__device__ __forceinline__ float as_float(int value) { return __int_as_float(value); }

// A launch that may begin before the one before it ends, from Hopper on.
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_last_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 16 bytes from global to shared memory, beside what the thread does next.
__device__ __forceinline__ void copy_16(char *target, const char *source) {
  const u32 at = (u32)__cvta_generic_to_shared(target);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(source) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int COUNT>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory");
}

__device__ __forceinline__ u32 load_one(const char *at) { return *(const u32 *)at; }
__device__ __forceinline__ void load_two(const char *at, u32 &first, u32 &second) {
  const uint2 found = *(const uint2 *)at;
  first = found.x;
  second = found.y;
}
__device__ __forceinline__ void store_four(int *at, const int (&values)[4]) {
  *(int4 *)at = make_int4(values[0], values[1], values[2], values[3]);
}

// (word & mask) | bits in one instruction: of constants the compiler makes two.
__device__ __forceinline__ u32 mask_or(u32 word, u32 mask, u32 bits) {
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// Codes s8 [16, 32] by activations s8 [32, 8], added to s32 [16, 8]; kernels/triton_ops/mma.py.
__device__ __forceinline__ void multiply_step(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Outputs are bf16 (0), fp16 (1) or fp32 (2).
__device__ __forceinline__ float load_output(int dtype, const void *y, i64 at) {
  if (dtype == 2) return ((const float *)y)[at];
  const unsigned short bits = ((const unsigned short *)y)[at];
  if (dtype == 0) return __uint_as_float((u32)bits << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ __forceinline__ void store_output(int dtype, void *y, i64 at, float value) {
  if (dtype == 2) {
    ((float *)y)[at] = value;
    return;
  }
  unsigned short bits;
  if (dtype == 0) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  }
  ((unsigned short *)y)[at] = bits;
}

extern __shared__ __align__(128) char shared_bytes[];
template <typename T>
__device__ __forceinline__ T &shared_memory() {
  return *reinterpret_cast<T *>(shared_bytes);
}
