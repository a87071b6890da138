#include "core/rank_metrics.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/launch.h"

namespace personvit {
namespace {

// Row r: the scores of query first + r, with the scratch of row r.
struct ScoreRows {
  RankCounts score;
  int64_t first;
  int64_t* scratch;  // [rows, most]
  int64_t most;

  __device__ void operator()(int64_t row) const { score(first + row, scratch + row * most); }
};

struct CountRows {
  RankCounts score;
  int64_t* sizes;  // [Q]

  __device__ void operator()(int64_t row) const { sizes[row] = score.same_identity(row); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> rank_counts_cuda(const Tensor& distances_, const Tensor& q_pids_,
                                                            const Tensor& g_pids_, const Tensor& q_camids_,
                                                            const Tensor& g_camids_) {
  check_rank_counts(distances_, q_pids_, g_pids_, q_camids_, g_camids_);
  const torch::stable::accelerator::DeviceGuard guard(distances_.get_device_index());
  const Tensor distances = torch::stable::contiguous(distances_);
  const Tensor q_pids = torch::stable::contiguous(q_pids_), g_pids = torch::stable::contiguous(g_pids_);
  const Tensor q_camids = torch::stable::contiguous(q_camids_), g_camids = torch::stable::contiguous(g_camids_);
  const cudaStream_t stream = current_stream(distances);
  const int64_t queries = distances.size(0);
  Tensor precision = torch::stable::new_empty(distances, {queries}, ScalarType::Double);
  Tensor penalty = torch::stable::new_empty(distances, {queries}, ScalarType::Double);
  Tensor first = torch::stable::new_empty(distances, {queries}, ScalarType::Long);
  Tensor matches = torch::stable::new_empty(distances, {queries}, ScalarType::Long);
  const RankCounts score{distances.const_data_ptr<float>(),    q_pids.const_data_ptr<int64_t>(),
                         g_pids.const_data_ptr<int64_t>(),     q_camids.const_data_ptr<int64_t>(),
                         g_camids.const_data_ptr<int64_t>(),   distances.size(1),
                         precision.mutable_data_ptr<double>(), penalty.mutable_data_ptr<double>(),
                         first.mutable_data_ptr<int64_t>(),    matches.mutable_data_ptr<int64_t>()};
  Tensor sizes = torch::stable::new_empty(matches, {queries}, ScalarType::Long);
  for_each_row(CountRows{score, sizes.mutable_data_ptr<int64_t>()}, queries, 64, stream);
  std::vector<int64_t> counts(static_cast<size_t>(queries));
  cudaError_t status = cudaMemcpyAsync(counts.data(), sizes.const_data_ptr<int64_t>(), counts.size() * 8,
                                       cudaMemcpyDeviceToHost, stream);
  status = status == cudaSuccess ? cudaStreamSynchronize(stream) : status;
  STD_TORCH_CHECK(status == cudaSuccess, "rank_counts: ", cudaGetErrorString(status));
  const int64_t most = std::max<int64_t>(1, counts.empty() ? 1 : *std::max_element(counts.begin(), counts.end()));
  const int64_t block = std::max<int64_t>(1, std::min(queries, (int64_t{1} << 25) / most));
  Tensor scratch = torch::stable::new_empty(matches, {block, most}, ScalarType::Long);
  for (int64_t start = 0; start < queries; start += block) {
    for_each_row(ScoreRows{score, start, scratch.mutable_data_ptr<int64_t>(), most}, std::min(block, queries - start),
                 64, stream);
  }
  return {precision, penalty, first, matches};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CUDA, library) { library.impl("rank_counts", TORCH_BOX(&rank_counts_cuda)); }

}  // namespace personvit
