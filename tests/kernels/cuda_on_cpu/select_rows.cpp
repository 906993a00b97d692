// SPDX-License-Identifier: Apache-2.0
// The CUDA selection on the CPU, row after row.

#include "select_rows.cuh"

#include <thread>

constexpr int kThreads = 64;

extern "C" void select_rows(const float* scores, const int64_t* count,
                            const int64_t* candidate_end, const int64_t* protected_end, int64_t* kept,
                            int rows, int num_heads, int length, int width, int num_blocks) {
  const int chunk = (length + num_blocks - 1) / num_blocks;
  const kvcompress::Selection selection{scores, count, candidate_end, protected_end, kept,
                                        num_heads, length, width, chunk};
  for (int row = 0; row < rows; ++row) {
    Cluster cluster(num_blocks * kThreads);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < num_blocks; ++rank) {
      cluster.blocks.emplace_back(kThreads, sizeof(kvcompress::BlockState) + 4 * chunk);
    }
    for (int i = 0; i < num_blocks * kThreads; ++i) {
      threads.emplace_back([&, i] {
        this_cluster = &cluster;
        this_block = &cluster.blocks[i / kThreads];
        threadIdx.x = i % kThreads;
        blockIdx.x = row * num_blocks + i / kThreads;
        kvcompress::select_rows<kThreads>(selection);
      });
    }
    for (auto& thread : threads) thread.join();
  }
}
