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

// A set against itself: the blocks on the diagonal, then each pair of blocks once.
void search_itself(const NeighbourTile<false>& diagonal, const NeighbourTile<true>& tile) {
  const Tournament tournament{block_count(tile.queries)};
  parallel_rows(tournament.blocks, 1, [&diagonal](int64_t block) { diagonal(block, block); });
  for (int64_t round = 0; round < tournament.rounds(); ++round) {
    parallel_rows(tournament.pairs(), 1, [&](int64_t number) {
      int64_t a = 0, b = 0;
      if (tournament.pair(round, number, &a, &b)) {
        tile(a, b);
      }
    });
  }
}

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
  const auto* query_data = query.const_data_ptr<float>();
  const auto* gallery_data = gallery.const_data_ptr<float>();
  const std::vector<float> panels = pack_panels(gallery_data, gallery_rows, features);
  const NeighbourTile<false> tile{query_data, panels.data(), rows, gallery_rows, features, &found};
  if (query_data == gallery_data && rows == gallery_rows) {
    search_itself(tile, NeighbourTile<true>{query_data, panels.data(), rows, gallery_rows, features, &found});
  } else {
    search(tile);
  }
  parallel_rows(rows, 256, [&found](int64_t row) { found.sort(row); });
  return {distances, indices, largest};
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
  library.impl("pairwise_distance", TORCH_BOX(&pairwise_distance_cpu));
}

}  // namespace personvit
