// SPDX-License-Identifier: Apache-2.0
// Exact top-k of rows in one launch: a row is read once and stays in the shared memory of a cluster.
//
// Every block of a cluster holds one chunk of its row as order keys. The threshold is found by radix
// selection, eight bits per pass, from counts that the blocks read from each other. Needs sm_90.

#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace kvcompress {

constexpr int kBins = 256;
constexpr int kPasses = 4;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// What to select, and where the result goes. Definition: triton_kernels/reference_scores.py.
struct Selection {
  const float* scores;            // [rows, length]
  const int64_t* count;           // [rows], positions to keep, protected ones included
  const int64_t* candidate_end;  // [rows / num_heads], positions [0, candidate_end) compete
  const int64_t* protected_end;      // [rows / num_heads], [candidate_end, protected_end) always stay
  int64_t* kept;                  // [rows, width], ascending; length where there are no more
  int num_heads, length, width;
  int chunk;                      // positions per block
};

// Of one block, in front of its keys.
struct BlockState {
  int counts[kPasses][kBins];  // of this block's keys
  int totals[kBins];           // of all keys of the row
  uint32_t found;              // bits of the threshold so far
  int rest;                    // how many to keep among the keys that have them
  int above, tied;             // this block's keys above the threshold, and equal to it
  int above_before, tied_before;
  int warp_above[kWarp], warp_tied[kWarp];
};

// Keys that sort like the numbers: NaN is 0, then -inf; both zeros are alike.
__device__ inline uint32_t order_key(float x) {
  uint32_t bits = __float_as_uint(x);
  if (x != x) return 0;
  if (bits == 0x80000000u) bits = 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One more digit of the threshold, by one warp: the largest that `rest` keys reach.
__device__ inline void next_digit(BlockState& state, int lane) {
  constexpr int kOwn = kBins / kWarp;
  const int* totals = state.totals + lane * kOwn;
  const uint32_t found = state.found;
  const int rest = state.rest;
  int own = 0;
  for (int i = 0; i < kOwn; ++i) own += totals[i];
  int from_here = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const int later = __shfl_down_sync(kAllLanes, from_here, step);
    if (lane + step < kWarp) from_here += later;
  }
  int above = from_here - own;
  __syncwarp();  // all lanes have read what one of them now replaces
  for (int i = kOwn - 1; i >= 0; --i) {
    const int bin = lane * kOwn + i, at_least = above + totals[i];
    if (at_least >= rest && (bin == kBins - 1 || above < rest)) {
      state.found = found << 8 | bin;
      state.rest = rest - above;
    }
    above = at_least;
  }
}

// Grid: a cluster per row. Dynamic shared memory: a BlockState, then `chunk` keys.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) select_rows(const Selection s) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp);
  extern __shared__ uint4 shared_memory[];
  BlockState& state = *reinterpret_cast<BlockState*>(shared_memory);
  uint32_t* keys = reinterpret_cast<uint32_t*>(&state + 1);

  const auto cluster = cooperative_groups::this_cluster();
  const int num_blocks = cluster.num_blocks(), rank = cluster.block_rank();
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t row = blockIdx.x / num_blocks;
  const int count = min(static_cast<int>(s.count[row]), s.width);
  const int candidate_end = s.candidate_end[row / s.num_heads];
  const int protected_end = max(static_cast<int>(s.protected_end[row / s.num_heads]), candidate_end);
  const int num_best = min(max(count - (protected_end - candidate_end), 0), candidate_end);
  const int num_protected = min(count - num_best, protected_end - candidate_end);
  const int first = rank * s.chunk;
  const int size = min(max(candidate_end - first, 0), s.chunk);

  for (int i = thread; i < kPasses * kBins; i += kThreads) (&state.counts[0][0])[i] = 0;
  if (thread == 0) {
    state.found = 0;
    state.rest = num_best;
  }
  __syncthreads();

  const float* scores = s.scores + row * s.length + first;
#pragma unroll 4
  for (int i = thread; i < size; i += kThreads) {
    keys[i] = order_key(scores[i]);
    atomicAdd(&state.counts[0][keys[i] >> 24], 1);
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = 24 - 8 * pass;
    const uint32_t found = state.found;
    for (int i = thread; pass > 0 && i < size; i += kThreads) {
      const uint32_t key = keys[i];
      if (key >> (shift + 8) == found) atomicAdd(&state.counts[pass][key >> shift & 255], 1);
    }
    cluster.sync();
    for (int bin = thread; bin < kBins; bin += kThreads) {
      int total = 0;
      for (int r = 0; r < num_blocks; ++r) {
        total += *cluster.map_shared_rank(&state.counts[pass][bin], r);
      }
      state.totals[bin] = total;
    }
    __syncthreads();
    if (warp == 0) next_digit(state, lane);
    __syncthreads();
  }

  // each warp places a run of its own; where to follows from counts of what comes before it
  constexpr int kWarps = kThreads / kWarp;
  const uint32_t last_key = state.found;
  const int rest = state.rest;
  const int run = (size + kThreads - 1) / kThreads * kWarp;
  const int begin = min(warp * run, size), end = min(begin + run, size);
  int above = 0, tied = 0;
  for (int i = begin + lane; i - lane < end; i += kWarp) {
    above += __popc(__ballot_sync(kAllLanes, i < end && keys[i] > last_key));
    tied += __popc(__ballot_sync(kAllLanes, i < end && keys[i] == last_key));
  }
  if (lane == 0) {
    state.warp_above[warp] = above;
    state.warp_tied[warp] = tied;
  }
  __syncthreads();
  if (thread == 0) {
    state.above = state.tied = 0;
    for (int w = 0; w < kWarps; ++w) {
      state.above += state.warp_above[w];
      state.tied += state.warp_tied[w];
    }
  }
  cluster.sync();
  if (thread == 0) {
    state.above_before = state.tied_before = 0;
    for (int r = 0; r < rank; ++r) {
      state.above_before += *cluster.map_shared_rank(&state.above, r);
      state.tied_before += *cluster.map_shared_rank(&state.tied, r);
    }
  }
  cluster.sync();  // nobody leaves while others read from it

  above = state.above_before;
  tied = state.tied_before;
  for (int w = 0; w < warp; ++w) {
    above += state.warp_above[w];
    tied += state.warp_tied[w];
  }
  int64_t* kept = s.kept + row * s.width;
  const unsigned lower_lanes = (1u << lane) - 1;
  for (int i = begin + lane; i - lane < end; i += kWarp) {
    const bool is_above = i < end && keys[i] > last_key, is_tied = i < end && keys[i] == last_key;
    const unsigned all_above = __ballot_sync(kAllLanes, is_above);
    const unsigned all_tied = __ballot_sync(kAllLanes, is_tied);
    const int ties_before = tied + __popc(all_tied & lower_lanes);
    if (is_above || (is_tied && ties_before < rest)) {
      kept[above + __popc(all_above & lower_lanes) + min(ties_before, rest)] = first + i;
    }
    above += __popc(all_above);
    tied += __popc(all_tied);
  }
  const int stride = num_blocks * kThreads, offset = rank * kThreads + thread;
  for (int i = offset; i < num_protected; i += stride) kept[num_best + i] = candidate_end + i;
  for (int i = num_best + num_protected + offset; i < s.width; i += stride) kept[i] = s.length;
}

}  // namespace kvcompress
