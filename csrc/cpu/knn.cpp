#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/knn_blocks.h"
#include "cpu/parallel.h"

namespace personvit {
namespace {

// Every query block against the whole gallery.
void search(const NeighbourTile<false>& tile) {
  parallel_rows(block_count(tile.queries), 1, [&tile](int64_t block) {
    for (int64_t other = 0; other < block_count(tile.gallery_rows); ++other) {
      tile(block, other);
    }
  });
}

// A set against itself, the rounds begin to end of block_count(rows) + 1: the blocks on the diagonal in the first one,
// then each pair of blocks once.
void search_itself(const NeighbourTile<false>& diagonal, const NeighbourTile<true>& tile, int64_t begin, int64_t end) {
  const Tournament tournament{block_count(tile.queries)};
  for (int64_t round = begin; round < end; ++round) {
    if (round == 0) {
      parallel_rows(tournament.blocks, 1, [&diagonal](int64_t block) { diagonal(block, block); });
      continue;
    }
    parallel_rows(tournament.pairs(), 1, [&](int64_t number) {
      int64_t a = 0, b = 0;
      if (tournament.pair(round - 1, number, &a, &b)) {
        tile(a, b);
      }
    });
  }
}

int64_t round_count(int64_t rows) { return 1 + Tournament{block_count(rows)}.rounds(); }

std::tuple<Tensor, Tensor, Tensor> knn_cpu(const Tensor& query_, const Tensor& gallery_, int64_t k) {
  check_knn(query_, gallery_, k);
  const Tensor query = torch::stable::contiguous(query_);
  const Tensor gallery = torch::stable::contiguous(gallery_);
  const int64_t rows = query.size(0);
  const int64_t gallery_rows = gallery.size(0);
  const int64_t features = query.size(1);
  Tensor distances = torch::stable::new_empty(query, {rows, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(query, {rows, k}, ScalarType::Long);
  Tensor largest = torch::stable::new_empty(query, {rows}, ScalarType::Float);
  Neighbours found(distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(),
                   largest.mutable_data_ptr<float>(), rows, k);
  found.clear();
  const auto* query_data = query.const_data_ptr<float>();
  const auto* gallery_data = gallery.const_data_ptr<float>();
  const std::vector<float> panels = pack_panels(gallery_data, gallery_rows, features);
  const NeighbourTile<false> tile{query_data, panels.data(), rows, gallery_rows, features, &found};
  if (query_data == gallery_data && rows == gallery_rows) {
    const NeighbourTile<true> both{query_data, panels.data(), rows, gallery_rows, features, &found};
    search_itself(tile, both, 0, round_count(rows));
  } else {
    search(tile);
  }
  parallel_rows(rows, 256, [&found](int64_t row) { found.sort(row); });
  return {distances, indices, largest};
}

// The same search of a set against itself in steps, so that the caller can show progress and be interrupted. The
// tensors keep what was found so far.
std::tuple<Tensor, Tensor, Tensor, Tensor> knn_begin_cpu(const Tensor& features_, int64_t k) {
  check_knn(features_, features_, k);
  const Tensor features = torch::stable::contiguous(features_);
  const int64_t rows = features.size(0);
  const int64_t width = features.size(1);
  Tensor panels = torch::stable::new_empty(features, {panel_count(rows), width, kPanel}, ScalarType::Float);
  pack_panels(features.const_data_ptr<float>(), rows, width, panels.mutable_data_ptr<float>());
  Tensor distances = torch::stable::new_empty(features, {rows, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(features, {rows, k}, ScalarType::Long);
  Tensor largest = torch::stable::new_empty(features, {rows}, ScalarType::Float);
  Neighbours(distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(),
             largest.mutable_data_ptr<float>(), rows, k)
      .clear();
  return {panels, distances, indices, largest};
}

// Round `step` of `steps` parts; the last one sorts the lists. Returns its number plus one.
int64_t knn_step_cpu(const Tensor& features_, const Tensor& panels, const Tensor& distances, const Tensor& indices,
                     const Tensor& largest, int64_t step, int64_t steps) {
  check_knn_step(features_, panels, distances, indices, largest, step, steps);
  const Tensor features = torch::stable::contiguous(features_);
  const int64_t rows = features.size(0);
  const int64_t width = features.size(1);
  Neighbours found(distances.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(),
                   largest.mutable_data_ptr<float>(), rows, distances.size(1));
  const auto* data = features.const_data_ptr<float>();
  const auto* packed = panels.const_data_ptr<float>();
  const NeighbourTile<false> diagonal{data, packed, rows, rows, width, &found};
  const NeighbourTile<true> both{data, packed, rows, rows, width, &found};
  const int64_t rounds = round_count(rows);
  search_itself(diagonal, both, rounds * step / steps, rounds * (step + 1) / steps);
  if (step + 1 == steps) {
    parallel_rows(rows, 256, [&found](int64_t row) { found.sort(row); });
  }
  return step + 1;
}

Tensor pairwise_distance_cpu(const Tensor& query_, const Tensor& gallery_) {
  check_pair(query_, gallery_, "pairwise_distance");
  const Tensor query = torch::stable::contiguous(query_);
  const Tensor gallery = torch::stable::contiguous(gallery_);
  const int64_t rows = query.size(0);
  const int64_t gallery_rows = gallery.size(0);
  const int64_t features = query.size(1);
  Tensor distances = torch::stable::new_empty(query, {rows, gallery_rows}, ScalarType::Float);
  auto* out = distances.mutable_data_ptr<float>();
  const std::vector<float> panels = pack_panels(gallery.const_data_ptr<float>(), gallery_rows, features);
  const DistanceRows compute{query.const_data_ptr<float>(), panels.data(), rows, gallery_rows, features};
  parallel_rows((rows + kDistanceRows - 1) / kDistanceRows, 1, [&](int64_t block) {
    const int64_t begin = block * kDistanceRows;
    compute(begin, std::min(begin + kDistanceRows, rows), out + begin * gallery_rows);
  });
  return distances;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(personvit, CPU, library) {
  library.impl("knn", TORCH_BOX(&knn_cpu));
  library.impl("knn_begin", TORCH_BOX(&knn_begin_cpu));
  library.impl("knn_step", TORCH_BOX(&knn_step_cpu));
  library.impl("pairwise_distance", TORCH_BOX(&pairwise_distance_cpu));
}

}  // namespace personvit
