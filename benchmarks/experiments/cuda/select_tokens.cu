// SPDX-License-Identifier: Apache-2.0
// Exact top-k of every head on GPUs with thread-block clusters (sm_90 and later).

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <cuda_runtime.h>
#include <torch/library.h>

#include <algorithm>

#include "select_rows.cuh"

namespace kvcompress {
namespace {

constexpr int kThreads = 1024;
constexpr int kMaxBlocks = 8;             // of a portable cluster
constexpr int64_t kPositions = 4096;      // per block, before a row gets more blocks
constexpr int64_t kMaxBytes = 224 << 10;  // of shared memory

void check(cudaError_t status) {
  TORCH_CHECK(status == cudaSuccess, "select_tokens: ", cudaGetErrorString(status));
}

// `stream` is the address of the stream to launch on.
at::Tensor select_tokens(const at::Tensor& scores, const at::Tensor& count,
                         const at::Tensor& candidate_end, const at::Tensor& protected_end,
                         int64_t max_count, int64_t stream) {
  TORCH_CHECK(scores.is_cuda() && scores.dim() == 3 && scores.scalar_type() == at::kFloat,
              "scores: expected float32 [N, Hkv, T] on a GPU");
  const auto x = scores.contiguous(), counts = count.contiguous();
  const auto candidates = candidate_end.contiguous(), ends = protected_end.contiguous();
  for (const auto& t : {counts, candidates, ends}) {
    TORCH_CHECK(t.device() == x.device() && t.scalar_type() == at::kLong,
                "counts and positions: expected int64 on the device of the scores");
  }
  const int64_t rows = x.size(0) * x.size(1), length = x.size(2);
  const int64_t width = std::min(max_count, length);
  auto kept = at::empty({x.size(0), x.size(1), width}, counts.options());
  if (rows == 0 || length == 0) return kept;

  int64_t blocks = 1;
  while (blocks < kMaxBlocks && length > blocks * kPositions) blocks *= 2;
  const int64_t chunk = (length + blocks - 1) / blocks;
  const int64_t bytes = sizeof(BlockState) + chunk * sizeof(uint32_t);
  TORCH_CHECK(bytes <= kMaxBytes, "select_tokens: ", length, " tokens are too many for one cluster");
  const Selection arguments{
      x.const_data_ptr<float>(), counts.const_data_ptr<int64_t>(),
      candidates.const_data_ptr<int64_t>(), ends.const_data_ptr<int64_t>(),
      kept.mutable_data_ptr<int64_t>(), static_cast<int>(x.size(1)), static_cast<int>(length),
      static_cast<int>(width), static_cast<int>(chunk)};

  const c10::DeviceGuard guard(x.device());
  const auto kernel = select_rows<kThreads>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments));
  return kept;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("select_tokens_cuda(Tensor scores, Tensor count, Tensor candidate_end, "
        "Tensor protected_end, int max_count, int stream) -> Tensor", &kvcompress::select_tokens);
}
