// Launches a functor of csrc/core once per row on the current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace personvit {

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename Functor>
__global__ void for_each_row_kernel(Functor functor, int64_t rows) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < rows; row += step) {
    functor(row);
  }
}

template <typename Functor>
void for_each_row(const Functor& functor, int64_t rows, int threads, cudaStream_t stream) {
  if (rows == 0) {
    return;  // a grid of no blocks is a launch error
  }
  const int64_t blocks = std::min<int64_t>((rows + threads - 1) / threads, 65535);
  for_each_row_kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(functor, rows);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace personvit
