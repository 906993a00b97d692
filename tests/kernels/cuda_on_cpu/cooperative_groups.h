// SPDX-License-Identifier: Apache-2.0
// As much of CUDA as csrc/cuda/select_rows.cuh uses, on threads of the CPU: one for each of a cluster.

#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)

using std::max;
using std::min;

struct uint4 {
  uint32_t x, y, z, w;
};

struct Warp {
  std::barrier<> barrier{32};
  uint32_t lanes[32];
};

struct Block {
  // what the memory holds before a kernel starts is arbitrary
  Block(int threads, size_t bytes)
      : memory(bytes / sizeof(uint4) + 1, uint4{~0u, ~0u, ~0u, ~0u}),
        barrier(threads), warps(threads / 32) {}
  std::vector<uint4> memory;
  std::barrier<> barrier;
  std::deque<Warp> warps;
};

struct Cluster {
  explicit Cluster(int threads) : barrier(threads) {}
  std::deque<Block> blocks;
  std::barrier<> barrier;
};

struct Index {
  unsigned x;
};

inline thread_local Cluster* this_cluster;
inline thread_local Block* this_block;
inline thread_local Index threadIdx, blockIdx;

inline Warp& this_warp() { return this_block->warps[threadIdx.x / 32]; }
inline void __syncthreads() { this_block->barrier.arrive_and_wait(); }
inline void __syncwarp() { this_warp().barrier.arrive_and_wait(); }

inline uint32_t __ballot_sync(unsigned, bool vote) {
  this_warp().lanes[threadIdx.x % 32] = vote;
  __syncwarp();
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= this_warp().lanes[lane] << lane;
  __syncwarp();
  return votes;
}

inline int __shfl_down_sync(unsigned, int value, int distance) {
  const int lane = threadIdx.x % 32, source = lane + distance < 32 ? lane + distance : lane;
  this_warp().lanes[lane] = value;
  __syncwarp();
  const int found = this_warp().lanes[source];
  __syncwarp();
  return found;
}

inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline void atomicAdd(int* place, int value) { std::atomic_ref<int>(*place).fetch_add(value); }

namespace cooperative_groups {

struct cluster_group {
  int num_blocks() const { return this_cluster->blocks.size(); }
  int block_rank() const { return blockIdx.x % num_blocks(); }
  void sync() const { this_cluster->barrier.arrive_and_wait(); }
  template <typename T>
  T* map_shared_rank(T* place, int rank) const {
    const auto offset = reinterpret_cast<char*>(place) -
                        reinterpret_cast<char*>(this_block->memory.data());
    auto* memory = reinterpret_cast<char*>(this_cluster->blocks[rank].memory.data());
    return reinterpret_cast<T*>(memory + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
