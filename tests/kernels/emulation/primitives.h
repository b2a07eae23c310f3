// The primitives of kernels/cuda_ops on a CPU: a thread for each thread of a block, and copies that
// arrive when they are waited for and not before.
#include <algorithm>
#include <barrier>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#define WARPS 2
// The least: segments are listed many times.
#define MAX_SEGMENTS 32
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

typedef long long i64;
typedef unsigned int u32;

using std::max;
using std::min;

struct Warp {
  std::barrier<> barrier{32};
  u32 words[32][6];
};
struct Block {
  std::barrier<> barrier{WARPS * 32};
  Warp warps[WARPS];
  int number, size;
  std::vector<char> shared;
};
struct Copy {
  char *target;
  const char *source;
};
static thread_local Block *own_block;
static thread_local int own_thread;
static thread_local std::deque<std::vector<Copy>> *own_copies;

inline int thread_number() { return own_thread; }
inline int block_number() { return own_block->number; }
inline int n_blocks() { return own_block->size; }
inline Warp &own_warp() { return own_block->warps[own_thread / 32]; }
inline void sync_block() { own_block->barrier.arrive_and_wait(); }
inline void sync_warp() { own_warp().barrier.arrive_and_wait(); }

template <typename T>
T exchange(T value, int from) {
  Warp &warp = own_warp();
  std::memcpy(warp.words[own_thread % 32], &value, 4);
  sync_warp();
  T found;
  std::memcpy(&found, warp.words[from], 4);
  sync_warp();
  return found;
}
inline int shuffle(int value, int lane) { return exchange(value, lane); }
inline int shuffle_up(int value, int distance) {
  return exchange(value, max(own_thread % 32 - distance, 0));
}
inline float shuffle_xor(float value, int mask) { return exchange(value, own_thread % 32 ^ mask); }
inline u32 vote(bool value) {
  u32 result = 0;
  for (int lane = 0; lane < 32; lane++) result |= exchange((u32)value, lane) << lane;
  return result;
}
inline int count_bits(u32 value) { return __builtin_popcount(value); }
inline float as_float(int value) {
  float found;
  std::memcpy(&found, &value, 4);
  return found;
}
inline void allow_next_launch() {}
inline void wait_for_last_launch() {}

inline void copy_16(char *target, const char *source) {
  if ((i64)target % 16 || (i64)source % 16) std::abort();
  own_copies->back().push_back({target, source});
}
inline void commit_copies() { own_copies->emplace_back(); }
template <int COUNT>
void wait_copies() {
  // The last entry is the group that is still open.
  while (own_copies->size() > COUNT + 1) {
    for (const Copy &copy : own_copies->front()) std::memcpy(copy.target, copy.source, 16);
    own_copies->pop_front();
  }
}

inline u32 load_one(const char *at) { return *(const u32 *)at; }
inline void load_two(const char *at, u32 &first, u32 &second) {
  first = ((const u32 *)at)[0];
  second = ((const u32 *)at)[1];
}
inline void store_four(int *at, const int (&values)[4]) { std::memcpy(at, values, 16); }
inline u32 mask_or(u32 word, u32 mask, u32 bits) { return (word & mask) | bits; }

inline int dot(u32 left, u32 right) {
  int sum = 0;
  for (int i = 0; i < 4; i++) sum += (signed char)(left >> 8 * i) * (signed char)(right >> 8 * i);
  return sum;
}
// Operands lie in the lanes as PTX ISA 8.7, "Matrix Fragments for mma.m16n8k32", has them.
inline void multiply_step(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  Warp &warp = own_warp();
  const int lane = own_thread % 32;
  u32 own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(warp.words[lane], own, sizeof own);
  sync_warp();
  for (int i = 0; i < 4; i++) {
    for (int t = 0; t < 4; t++) {
      const u32 *left = warp.words[lane / 4 * 4 + t];
      const u32 *right = warp.words[(lane % 4 * 2 + i % 2) * 4 + t];
      c[i] += dot(left[i / 2], right[4]) + dot(left[i / 2 + 2], right[5]);
    }
  }
  sync_warp();
}

inline float load_output(int dtype, const void *y, i64 at) {
  return dtype == 2 ? ((const float *)y)[at] : as_float(((const unsigned short *)y)[at] << 16);
}
inline void store_output(int dtype, void *y, i64 at, float value) {
  if (dtype == 2) {
    ((float *)y)[at] = value;
    return;
  }
  u32 bits;
  std::memcpy(&bits, &value, 4);
  ((unsigned short *)y)[at] = (unsigned short)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
template <typename T>
T &shared_memory() {
  return *(T *)(((i64)own_block->shared.data() + 127) / 128 * 128);
}
