// Decode for many tenants: what batch_shrink_kernel and batch_expand_kernel of
// kernels/triton_ops/batch.py do, with the codes on their way through a ring in shared memory.
//
// One block of WARPS warps a multiprocessor takes an equal share of all codes of a launch, and each
// warp copies its codes ahead of itself (cp.async), whatever tenant, band or row they belong to. So
// no warp waits for a chain of slot, directory and record before its codes stream, and groups of
// tokens of one tenant that follow each other read its codes once. Layouts: kernels/fragments.py,
// kernels/directory.py. Compiled at run time without headers; kernels/cuda_ops/launch.py.

#ifndef WARPS
#define WARPS 16
#endif
#ifndef MAX_SEGMENTS
#define MAX_SEGMENTS 64  // that a block of threads lists at a time
#endif

constexpr int MAX_RECORDS = 32, MAX_PARTS = 8, RECORD_INTS = 16, PART_INTS = 8, N_WIDTHS = 5;
constexpr int SHRINK_RECORDS = 2 * MAX_RECORDS;
constexpr int EXPAND_PARTS = SHRINK_RECORDS + MAX_RECORDS * RECORD_INTS;
constexpr int EXPAND_RECORDS = EXPAND_PARTS + MAX_PARTS * PART_INTS;
constexpr int COSTS = EXPAND_RECORDS + MAX_PARTS * N_WIDTHS * RECORD_INTS;
constexpr float LARGEST = 1073741824.0f;

constexpr int MAX_GROUPS = 256;  // of a launch
constexpr int MAX_UNITS = 4;     // groups of one tenant that share a pass over its codes
constexpr int SLOTS = 4;         // of a warp's ring
constexpr int SLOT_BYTES = 1024;
constexpr int SHARES = 4;  // row blocks times units whose sums are joined at a time

struct Args {
  const i64 *x;
  const float *step, *norm;
  signed char *hidden;
  const i64 *table;
  const int *directory;
  i64 slot_stride, site_offset;
  const int *group_slots, *group_counts, *group_tokens;
  void *y;
  i64 y_stride;
  int x_steps, h_steps, n_groups, planes, dtype;
};

// Codes of one band: from `codes`, and its third bits from `high`, n_steps for each row block.
struct Band {
  const char *codes, *high;
  int bits, n_steps, n_blocks, first_step;
};

// Row blocks first .. last of one record (shrink) or part (expand), for the tokens of n_units
// groups from `group` on. `place` counts the row blocks of the segments before.
struct Segment {
  Band bands[N_WIDTHS];
  int n_bands, first, last, place, group, n_units, n_rows, first_row;
  float bound;
  const float *factors;
};

struct Shared {
  char ring[WARPS][SLOTS][SLOT_BYTES];
  Segment segments[MAX_SEGMENTS];
  int slots[MAX_GROUPS], units[MAX_GROUPS], costs[MAX_GROUPS], begins[MAX_GROUPS];
  int n_segments, next_group, total;
  // An expand has no use for these, and is launched without room for them.
  alignas(16) int sums[2][SHARES][WARPS][32][4];
};
#ifdef SHRINK_BYTES
static_assert(sizeof(Shared) <= SHRINK_BYTES, "as launched");
static_assert(sizeof(Shared) - sizeof(Shared::sums) <= EXPAND_BYTES, "as launched");
#endif

__device__ __forceinline__ int pairs_of_slot(int bits) { return bits <= 2 ? 4 : bits <= 4 ? 2 : 1; }

// Bytes of a pair of steps in the plane that every width has.
__device__ __forceinline__ int pair_bytes(int bits) { return bits == 3 ? 256 : 128 * bits; }

__device__ __forceinline__ i64 block_bytes(int bits, int n_steps) {
  return bits == 1 ? (n_steps + 1) / 2 * 128 : (i64)n_steps * (pair_bytes(bits) / 2);
}

__device__ __forceinline__ int scan(int value, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = shuffle_up(value, distance);
    if (lane >= distance) value += before;
  }
  return value;
}

// Where a warp's next codes come from. `pair` and `end` are those of its share of the row block.
struct Cursor {
  int segment, block, band, pair, end;
  const char *low, *high;
  int bits, n_steps;
};

struct Masks {
  u32 value, one, third;
};

template <int BITS>
__device__ __forceinline__ Masks masks_of() {
  Masks m;
  m.value = BITS == 1 ? 0x80808080u : BITS == 2 ? 0xC0C0C0C0u : BITS == 3 ? 0x60606060u : 0xF0F0F0F0u;
  m.one = BITS == 1 ? 0x40404040u : BITS == 2 ? 0x20202020u : BITS == 3 ? 0x10101010u : 0x08080808u;
  m.third = 0x80808080u;
  return m;
}

// Codes of one step as signed bytes, `unpack_step` of kernels/triton_ops/mma.py.
template <int BITS>
__device__ __forceinline__ void unpack(const char *slot, int step, int lane, Masks m, u32 (&a)[4]) {
  if (BITS == 8) {
    const char *at = slot + step * 512 + lane * 8;
    load_two(at, a[0], a[1]);
    load_two(at + 256, a[2], a[3]);
  } else if (BITS == 4) {
    u32 words[2];
    load_two(slot + step * 256 + lane * 8, words[0], words[1]);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = mask_or(words[i / 2] << (4 - 4 * (i % 2)), m.value, m.one);
  } else if (BITS == 1) {
    const u32 word = load_one(slot + step / 2 * 128 + lane * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = mask_or(word << (7 - 4 * (step % 2) - i), m.value, m.one);
  } else {
    const u32 word = load_one(slot + step * 128 + lane * 4);
    u32 third = 0;
    if (BITS == 3) third = load_one(slot + 512 + step / 2 * 128 + lane * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (BITS == 2) {
        a[i] = mask_or(word << (6 - 2 * i), m.value, m.one);
      } else {
        const u32 low = i == 3 ? word >> 1 : word << (5 - 2 * i);
        a[i] = mask_or(third << (7 - 4 * (step % 2) - i), m.third, mask_or(low, m.value, m.one));
      }
    }
  }
}

// Add one step to the sums of NT units; of eight bits, also what their bytes lack of the codes.
template <int BITS, int NT>
__device__ __forceinline__ void multiply_one(const char *slot, const i64 *x, const int (&units)[NT], int step,
                                             int lane, Masks m, int (&acc)[NT][4],
                                             int (&total)[NT][4]) {
  u32 a[4];
  unpack<BITS>(slot, step, lane, m, a);
#pragma unroll
  for (int unit = 0; unit < NT; unit++) {
    const i64 b = x[units[unit] + step * 32];
    multiply_step(acc[unit], a, (u32)b, (u32)(b >> 32));
    if (BITS == 8) {
      const u32 one[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
      multiply_step(total[unit], one, (u32)b, (u32)(b >> 32));
    }
  }
}

// Multiply the first n_steps of a slot; `x` is at the slot's first step.
template <int BITS, int NT>
__device__ __forceinline__ void multiply_slot(const char *slot, const i64 *x, const int (&units)[NT],
                                              int n_steps, int lane, int (&acc)[NT][4],
                                              int (&total)[NT][4]) {
  constexpr int STEPS = BITS <= 2 ? 8 : BITS <= 4 ? 4 : 2;
  const Masks m = masks_of<BITS>();
  if (n_steps >= STEPS) {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
      multiply_one<BITS, NT>(slot, x, units, step, lane, m, acc, total);
  } else {
#pragma unroll 1
    for (int step = 0; step < n_steps; step++)
      multiply_one<BITS, NT>(slot, x, units, step, lane, m, acc, total);
  }
}

// Sums of odd multiples of 2^(7 - BITS) become sums of the odd numbers.
template <int NT>
__device__ __forceinline__ void finish_band(int bits, int (&acc)[NT][4], int (&total)[NT][4]) {
#pragma unroll
  for (int unit = 0; unit < NT; unit++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      total[unit][i] += bits == 8 ? 2 * acc[unit][i] : acc[unit][i] >> (7 - bits);
      acc[unit][i] = 0;
    }
  }
}

template <int NT>
__device__ __forceinline__ void multiply_any(int bits, const char *slot, const i64 *x, const int (&units)[NT],
                                             int n_steps, int lane, int (&acc)[NT][4],
                                             int (&total)[NT][4]) {
  if (bits == 2) {
    multiply_slot<2, NT>(slot, x, units, n_steps, lane, acc, total);
  } else if (bits == 1) {
    multiply_slot<1, NT>(slot, x, units, n_steps, lane, acc, total);
  } else if (bits == 3) {
    multiply_slot<3, NT>(slot, x, units, n_steps, lane, acc, total);
  } else if (bits == 4) {
    multiply_slot<4, NT>(slot, x, units, n_steps, lane, acc, total);
  } else {
    multiply_slot<8, NT>(slot, x, units, n_steps, lane, acc, total);
  }
}

// Ask for the codes of a slot that begins at `pair`; the steps beyond `end` or the last stay away.
__device__ __forceinline__ void copy_slot(char *slot, const Cursor &at, int lane) {
  const int pairs = min(pairs_of_slot(at.bits), at.end - at.pair);
  const int steps = min(2 * pairs, at.n_steps - 2 * at.pair);
  const int low = at.bits == 1 ? (steps + 1) / 2 * 128 : steps * (pair_bytes(at.bits) / 2);
  const char *from = at.low + (i64)at.pair * pair_bytes(at.bits) + lane * 16;
  if (lane * 16 < low) copy_16(slot + lane * 16, from);
  if (lane * 16 + 512 < low) copy_16(slot + lane * 16 + 512, from + 512);
  if (at.bits == 3 && lane * 16 < (steps + 1) / 2 * 128) {
    copy_16(slot + 512 + lane * 16, at.high + (i64)at.pair * 128 + lane * 16);
  }
}

// Groups of the tenant of `group` from there on that share a pass, 0 where another one leads it.
__device__ __forceinline__ int count_units(const Args &args, const Shared &shared, int group) {
  const int slot = shared.slots[group];
  int before = 0, units = 0;
  while (group > before && shared.slots[group - before - 1] == slot) before++;
  if (slot < 0 || before % MAX_UNITS != 0) return 0;
  while (units < MAX_UNITS && group + units < args.n_groups && shared.slots[group + units] == slot)
    units++;
  return units;
}

// What each pass over a tenant's codes costs, and where it begins among all passes.
template <bool IS_SHRINK>
__device__ void count_work(const Args &args, Shared &shared, int warp, int lane) {
  const int thread = warp * 32 + lane;
  for (int group = thread; group < args.n_groups; group += WARPS * 32) {
    shared.slots[group] = args.group_slots[group];
  }
  sync_block();
  for (int group = thread; group < args.n_groups; group += WARPS * 32) {
    const int units = count_units(args, shared, group);
    const int *entry = args.directory + shared.slots[group] * args.slot_stride + args.site_offset;
    shared.units[group] = units;
    shared.costs[group] = units > 0 ? entry[COSTS + (IS_SHRINK ? 0 : 1)] * (3 + units) : 0;
  }
  sync_block();
  if (warp == 0) {
    int total = 0;
    for (int first = 0; first < args.n_groups; first += 32) {
      const int group = first + lane;
      const int own = group < args.n_groups ? shared.costs[group] : 0;
      const int end = scan(own, lane);
      if (group < args.n_groups) shared.begins[group] = total + end - own;
      total += shuffle(end, 31);
    }
    if (lane == 0) {
      shared.total = total;
      shared.next_group = 0;
    }
  }
  sync_block();
}

__device__ __forceinline__ Band read_band(const int *record, const char *slab) {
  Band band;
  band.codes = slab + (i64)record[1] * 128;
  band.high = slab + (i64)record[2] * 128;
  band.bits = record[0];
  band.n_steps = record[5];
  band.n_blocks = record[4];
  band.first_step = record[8];
  return band;
}

// Write the next segments of this block's share of the work; warp 0 only.
template <bool IS_SHRINK>
__device__ void list_segments(const Args &args, Shared &shared, int lane) {
  const i64 total = shared.total;
  const int low = (int)(total * block_number() / n_blocks());
  const int high = (int)(total * (block_number() + 1) / n_blocks());
  int n = 0, place = 0, group = shared.next_group;
  for (; group < args.n_groups && n + MAX_RECORDS <= MAX_SEGMENTS; group++) {
    const int begin = shared.begins[group];
    if (begin >= high) {
      group = args.n_groups;
      break;
    }
    const int units = shared.units[group];
    if (units == 0 || begin + shared.costs[group] <= low) continue;
    const int slot = shared.slots[group];
    const int *entry = args.directory + slot * args.slot_stride + args.site_offset;
    int blocks = 0, each = 0;
    if (IS_SHRINK) {
      blocks = entry[lane] / 16;
      each = entry[SHRINK_RECORDS + lane * RECORD_INTS + 10];
    } else if (lane < MAX_PARTS) {
      blocks = (entry[MAX_RECORDS + lane] + 15) / 16;
      each = entry[EXPAND_PARTS + lane * PART_INTS + 4];
    }
    each *= 3 + units;
    const int start = begin + scan(blocks * each, lane) - blocks * each;
    int first = 0, last = 0;
    if (blocks > 0 && start < high) {
      first = start >= low ? 0 : (low - start + each - 1) / each;
      last = min(blocks, (high - start + each - 1) / each);
    }
    const int size = max(last - first, 0);
    const u32 chosen = vote(size > 0);
    const int own_place = place + scan(size, lane) - size;
    if (size > 0) {
      Segment &segment = shared.segments[n + count_bits(chosen & ((1u << lane) - 1))];
      const char *slab = (const char *)args.table[slot];
      int part = lane;
      segment.n_bands = 0;
      if (IS_SHRINK) {
        const int *record = entry + SHRINK_RECORDS + lane * RECORD_INTS;
        segment.bands[0] = read_band(record, slab);
        segment.n_bands = 1;
        segment.n_rows = record[3];
        segment.factors = (const float *)(slab + (i64)record[6] * 128);
        part = record[9];
      } else {
        for (int i = 0; i < N_WIDTHS; i++) {
          const int *record = entry + EXPAND_RECORDS + (lane * N_WIDTHS + i) * RECORD_INTS;
          if (record[5] > 0) segment.bands[segment.n_bands++] = read_band(record, slab);
        }
        segment.n_rows = entry[MAX_RECORDS + lane];
      }
      const int *own = entry + EXPAND_PARTS + part * PART_INTS;
      segment.first_row = own[0];
      segment.bound = as_float(own[1]);
      segment.first = first;
      segment.last = last;
      segment.place = own_place;
      segment.group = group;
      segment.n_units = units;
    }
    n += count_bits(chosen);
    place += shuffle(scan(size, lane), 31);
  }
  if (lane == 0) {
    shared.n_segments = n;
    shared.next_group = group;
  }
}

// The pairs of a row block that a warp multiplies: all of them, or its share of a shrink.
template <bool IS_SHRINK>
__device__ __forceinline__ void share_pairs(int n_steps, int warp, int &first, int &end) {
  const int n_pairs = (n_steps + 1) / 2;
  first = 0;
  end = n_pairs;
  if (IS_SHRINK) {
    const int each = (n_pairs + WARPS - 1) / WARPS;
    first = min(warp * each, n_pairs);
    end = min(first + each, n_pairs);
  }
}

// First row block of a segment that is this warp's, and how far the next one is.
template <bool IS_SHRINK>
__device__ __forceinline__ int first_block(const Segment &segment, int warp) {
  return segment.first + (IS_SHRINK ? 0 : (warp + WARPS - segment.place % WARPS) % WARPS);
}

// Set a cursor to the row block and band it names, on to others where nothing is to be read there.
template <bool IS_SHRINK>
__device__ __forceinline__ void settle(const Shared &shared, Cursor &at, int warp) {
  while (at.segment < shared.n_segments) {
    const Segment &segment = shared.segments[at.segment];
    if (at.block < segment.last && at.band < segment.n_bands) {
      const Band &band = segment.bands[at.band];
      share_pairs<IS_SHRINK>(band.n_steps, warp, at.pair, at.end);
      if (at.pair < at.end && at.block < band.n_blocks) {
        const i64 offset = at.block * block_bytes(band.bits, band.n_steps);
        at.bits = band.bits;
        at.n_steps = band.n_steps;
        at.low = band.codes + offset;
        at.high = band.high + (i64)at.block * ((band.n_steps + 1) / 2 * 128);
        return;
      }
      at.band++;
    } else if (at.block < segment.last) {
      at.band = 0;
      at.block += IS_SHRINK ? 1 : WARPS;
    } else {
      at.segment++;
      at.band = 0;
      if (at.segment < shared.n_segments)
        at.block = first_block<IS_SHRINK>(shared.segments[at.segment], warp);
    }
  }
}

// A warp's ring: codes are asked for SLOTS ahead of their use.
template <bool IS_SHRINK>
struct Ring {
  Shared &shared;
  Cursor ahead;
  int warp, lane, filled, used;

  __device__ Ring(Shared &room, int own_warp, int own_lane)
      : shared(room), warp(own_warp), lane(own_lane), filled(0), used(0) {}

  __device__ void start() {
    ahead.segment = ahead.band = 0;
    ahead.block = shared.n_segments > 0 ? first_block<IS_SHRINK>(shared.segments[0], warp) : 0;
    settle<IS_SHRINK>(shared, ahead, warp);
    for (int i = 0; i < SLOTS; i++) ask();
  }

  __device__ __forceinline__ void ask() {
    if (ahead.segment < shared.n_segments) {
      copy_slot(shared.ring[warp][filled % SLOTS], ahead, lane);
      ahead.pair += pairs_of_slot(ahead.bits);
      if (ahead.pair >= ahead.end) {
        ahead.band++;
        settle<IS_SHRINK>(shared, ahead, warp);
      }
    }
    filled++;
    commit_copies();
  }

  __device__ __forceinline__ const char *take() {
    wait_copies<SLOTS - 1>();
    sync_warp();
    return shared.ring[warp][used % SLOTS];
  }

  __device__ __forceinline__ void give() {
    used++;
    sync_warp();
    ask();
  }
};

// Which lanes' activations a lane reads. Columns of tokens and planes that do not exist are read
// from others: their sums are left out in the end, and only what exists is moved.
__device__ __forceinline__ int choose_columns(const Args &args, const Segment &segment, int planes) {
  const bool is_lone = segment.n_units == 1 && args.group_counts[segment.group] == 1;
  return (is_lone ? 15 : 31) & (planes == 2 ? ~8 : ~0);
}

// Multiply a warp's share of one row block, all bands of it, and add to `total`.
template <bool IS_SHRINK, int NT>
__device__ __forceinline__ void multiply_block(Ring<IS_SHRINK> &ring, const Segment &segment,
                                               int block, const i64 *source, int steps,
                                               int columns, int (&total)[NT][4]) {
  int acc[NT][4] = {};
  const i64 *x = source + (i64)segment.group * steps * 32 + (ring.lane & columns);
  int units[NT];
#pragma unroll
  for (int unit = 0; unit < NT; unit++) units[unit] = min(unit, segment.n_units - 1) * steps * 32;
  for (int number = 0; number < segment.n_bands; number++) {
    const Band &band = segment.bands[number];
    const int bits = band.bits;
    const i64 *own = IS_SHRINK ? x : x + band.first_step * 32;
    int pair, end;
    share_pairs<IS_SHRINK>(band.n_steps, ring.warp, pair, end);
    if (block >= band.n_blocks) end = pair;
    for (; pair < end; pair += pairs_of_slot(bits)) {
      const int pairs = min(pairs_of_slot(bits), end - pair);
      const int n_steps = min(2 * pairs, band.n_steps - 2 * pair);
      const char *slot = ring.take();
      multiply_any<NT>(bits, slot, own + pair * 64, units, n_steps, ring.lane, acc, total);
      ring.give();
    }
    finish_band<NT>(bits, acc, total);
  }
}

__device__ __forceinline__ float weigh(int plane, int planes) {
  const int digit = planes - 1 - plane;
  return digit < 0 ? 0.0f : (float)(1 << (8 * digit));
}

__device__ __forceinline__ signed char digit_of(int value, int plane) {
  // Digits from the lowest on; plane 0 holds the highest.
  signed char digit = 0;
#pragma unroll
  for (int i = 3; i >= 0; i--) {
    const int own = (value << 24) >> 24;
    if (i == plane) digit = (signed char)own;
    value = (value - own) >> 8;
  }
  return digit;
}

// Join the warps' shares of up to SHARES / NT row blocks, and write their hidden planes.
template <int NT>
__device__ __forceinline__ void join_shares(const Args &args, Shared &shared,
                                            const Segment &segment, int first, int buffer,
                                            int thread) {
  for (int item = thread; item < SHARES * 128; item += WARPS * 32) {
    const int share = item / 128, within = item % 128;
    const int lane = within / 4, reg = within % 4;
    const int block = first + share / NT, unit = share % NT;
    const int token = lane % 4 / 2, plane = lane % 2 * 2 + reg % 2;
    int sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++)
      sum += shared.sums[buffer][share][warp][lane][reg];
    float value = (float)sum * weigh(plane, args.planes);
    value += shuffle_xor(value, 1);
    value += shuffle_xor(value, 4);
    const int row = block * 16 + lane / 4 + reg / 2 * 8;
    const int group = segment.group + unit;
    if (block < segment.last && unit < segment.n_units && token < args.group_counts[group]) {
      const float factor = row < segment.n_rows ? segment.factors[row] : 0.0f;
      const int place = group * 2 + token;
      const float worth = 0.5f * args.step[place] / (args.norm[place] * segment.bound);
      const float h = value * factor * (worth * LARGEST);
      const i64 step = (i64)group * args.h_steps + segment.bands[0].first_step + row / 32;
      args.hidden[((step * 8) + 4 * token + plane) * 32 + row % 32] =
          digit_of((int)(h + (h < 0 ? -0.5f : 0.5f)), plane);
    }
  }
}

template <int NT>
__device__ void shrink_segment(const Args &args, Shared &shared, Ring<true> &ring,
                               const Segment &segment, int &buffer) {
  constexpr int BLOCKS = SHARES / NT;
  const int columns = choose_columns(args, segment, args.planes);
  for (int first = segment.first; first < segment.last; first += BLOCKS) {
    const int end = min(first + BLOCKS, segment.last);
    for (int block = first; block < end; block++) {
      int total[NT][4] = {};
      multiply_block<true, NT>(ring, segment, block, args.x, args.x_steps, columns, total);
#pragma unroll
      for (int unit = 0; unit < NT; unit++) {
        store_four(shared.sums[buffer][(block - first) * NT + unit][ring.warp][ring.lane],
                   total[unit]);
      }
    }
    sync_block();
    join_shares<NT>(args, shared, segment, first, buffer, ring.warp * 32 + ring.lane);
    // The other buffer is free: all warps have passed the barrier after reading it.
    buffer = 1 - buffer;
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) shrink(const Args args) {
  Shared &shared = shared_memory<Shared>();
  const int thread = thread_number(), warp = thread / 32, lane = thread % 32;
  allow_next_launch();
  count_work<true>(args, shared, warp, lane);
  bool is_first = true;
  int buffer = 0;
  bool has_more = true;
  while (has_more) {
    if (warp == 0) list_segments<true>(args, shared, lane);
    sync_block();
    has_more = shared.next_group < args.n_groups;
    Ring<true> ring(shared, warp, lane);
    ring.start();
    if (is_first) wait_for_last_launch();
    is_first = false;
    for (int i = 0; i < shared.n_segments; i++) {
      const Segment &segment = shared.segments[i];
      if (segment.n_units == 1) {
        shrink_segment<1>(args, shared, ring, segment, buffer);
      } else if (segment.n_units == 2) {
        shrink_segment<2>(args, shared, ring, segment, buffer);
      } else {
        shrink_segment<4>(args, shared, ring, segment, buffer);
      }
    }
    sync_block();
  }
  if (is_first) wait_for_last_launch();
}

// One row block of outputs for NT groups of tokens: y += U h.
template <int NT>
__device__ __forceinline__ void expand_block(const Args &args, Ring<false> &ring,
                                             const Segment &segment, int block, int columns,
                                             const i64 (&at)[NT], const float (&worth)[NT]) {
  const int row = block * 16 + ring.lane / 4;
  float y[NT][2];
#pragma unroll
  for (int unit = 0; unit < NT; unit++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const bool exists = at[unit] >= 0 && row + 8 * half < segment.n_rows;
      y[unit][half] = exists ? load_output(args.dtype, args.y, at[unit] + row + 8 * half) : 0.0f;
    }
  }
  int total[NT][4] = {};
  multiply_block<false, NT>(ring, segment, block, (const i64 *)args.hidden, args.h_steps, columns,
                            total);
  const float high = ring.lane % 2 ? 256.0f : 16777216.0f, low = ring.lane % 2 ? 1.0f : 65536.0f;
#pragma unroll
  for (int unit = 0; unit < NT; unit++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float value = (float)total[unit][2 * half] * high + (float)total[unit][2 * half + 1] * low;
      value += shuffle_xor(value, 1);
      if (at[unit] >= 0 && row + 8 * half < segment.n_rows) {
        store_output(args.dtype, args.y, at[unit] + row + 8 * half, y[unit][half] + value * worth[unit]);
      }
    }
  }
}

template <int NT>
__device__ void expand_segment(const Args &args, Ring<false> &ring, const Segment &segment) {
  i64 at[NT];
  float worth[NT];
  const int token = ring.lane % 4 / 2, columns = choose_columns(args, segment, 4);
#pragma unroll
  for (int unit = 0; unit < NT; unit++) {
    const int place = (segment.group + unit) * 2 + token;
    at[unit] = -1;
    worth[unit] = 0.0f;
    // Both lanes of a token have its sum: the first one writes it.
    if (ring.lane % 2 == 0 && unit < segment.n_units && args.group_tokens[place] >= 0) {
      at[unit] = args.group_tokens[place] * args.y_stride + segment.first_row;
      worth[unit] = 0.5f * args.norm[place] * segment.bound / LARGEST;
    }
  }
  for (int block = first_block<false>(segment, ring.warp); block < segment.last; block += WARPS) {
    expand_block<NT>(args, ring, segment, block, columns, at, worth);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) expand(const Args args) {
  Shared &shared = shared_memory<Shared>();
  const int thread = thread_number(), warp = thread / 32, lane = thread % 32;
  allow_next_launch();
  count_work<false>(args, shared, warp, lane);
  bool is_first = true;
  bool has_more = true;
  while (has_more) {
    if (warp == 0) list_segments<false>(args, shared, lane);
    sync_block();
    has_more = shared.next_group < args.n_groups;
    Ring<false> ring(shared, warp, lane);
    ring.start();
    if (is_first) wait_for_last_launch();
    is_first = false;
    for (int i = 0; i < shared.n_segments; i++) {
      const Segment &segment = shared.segments[i];
      if (segment.n_units == 1) {
        expand_segment<1>(args, ring, segment);
      } else if (segment.n_units == 2) {
        expand_segment<2>(args, ring, segment);
      } else {
        expand_segment<4>(args, ring, segment);
      }
    }
    sync_block();
  }
  if (is_first) wait_for_last_launch();
}
