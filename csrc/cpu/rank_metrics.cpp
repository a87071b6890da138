#include "core/rank_metrics.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/parallel.h"

namespace personvit {
namespace {

PERSONVIT_FLAT_CLONES
void score_query(const RankCounts& score, int64_t query, std::vector<int64_t>* scratch) {
  scratch->resize(static_cast<size_t>(score.gallery_rows));
  score(query, scratch->data());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rank_counts_cpu(const Tensor& distances_, const Tensor& q_pids_,
                                                           const Tensor& g_pids_, const Tensor& q_camids_,
                                                           const Tensor& g_camids_) {
  check_rank_counts(distances_, q_pids_, g_pids_, q_camids_, g_camids_);
  const Tensor distances = torch::stable::contiguous(distances_);
  const Tensor q_pids = torch::stable::contiguous(q_pids_), g_pids = torch::stable::contiguous(g_pids_);
  const Tensor q_camids = torch::stable::contiguous(q_camids_), g_camids = torch::stable::contiguous(g_camids_);
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
  torch::stable::parallel_for(0, queries, 8, [&score](int64_t begin, int64_t end) {
    std::vector<int64_t> scratch;
    for (int64_t query = begin; query < end; ++query) {
      score_query(score, query, &scratch);
    }
  });
  return {precision, penalty, first, matches};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CPU, library) { library.impl("rank_counts", TORCH_BOX(&rank_counts_cpu)); }

}  // namespace personvit
