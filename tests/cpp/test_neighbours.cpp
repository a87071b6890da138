// Tests of distances and neighbours for the sanitizers, over random shapes: every buffer has exactly the size that the
// algorithm may touch, and every result is compared with the shortest way to compute it.
// Usage: test_neighbours NAME
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "core/k_reciprocal.h"
#include "core/knn.h"
#include "core/rank_metrics.h"
#include "core/reciprocal_weights.h"
#include "cpu/entry_distances.h"
#include "cpu/knn_blocks.h"

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> pack(const std::vector<float>& gallery, int64_t rows, int64_t features) {
  std::vector<float> panels(at(personvit::panel_count(rows) * personvit::kPanel * features));
  for (int64_t panel = 0; panel < personvit::panel_count(rows); ++panel) {
    personvit::pack_panel(gallery.data(), rows, panel * personvit::kPanel, features,
                          panels.data() + panel * personvit::kPanel * features);
  }
  return panels;
}

// Every way to compute a distance gives the same bits.
void test_panels() {
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    const int64_t queries = 1 + below(random, 20), rows = 1 + below(random, 40), features = below(random, 70);
    const std::vector<float> query = random_features(random, queries * features, 1000);
    const std::vector<float> gallery = random_features(random, rows * features, 1000);
    const std::vector<float> panels = pack(gallery, rows, features);
    std::vector<float> distances(at(queries * rows));
    const personvit::DistanceRows compute{query.data(), panels.data(), queries, rows, features};
    const int64_t middle = below(random, queries + 1);
    compute(0, middle, distances.data());
    compute(middle, queries, distances.data() + middle * rows);
    std::vector<int64_t> indptr{0}, indices;
    for (int64_t row = 0; row < rows; ++row) {
      indices.push_back(row);
    }
    indptr.push_back(rows);
    for (int64_t row = 0; row < queries; ++row) {
      for (int64_t column = 0; column < rows; ++column) {
        const float expected =
            personvit::squared_distance(query.data() + row * features, gallery.data() + column * features, features);
        CHECK(distances[at(row * rows + column)] == expected);
        CHECK(expected ==
              personvit::squared_distance(gallery.data() + column * features, query.data() + row * features, features));
      }
    }
    std::vector<float> by_functor(at(rows)), by_several(at(rows));
    personvit::EntryDistances entries{gallery.data(), indptr.data(), indices.data(), features, by_functor.data()};
    entries(0);
    entries.values = by_several.data();
    personvit::entry_distances(entries, 0);
    CHECK(by_functor == by_several);
    const float* pointers[personvit::kQueries];
    personvit::query_rows(query.data(), queries, 0, features, pointers);
    float fast[personvit::kQueries * personvit::kPanel], plain[personvit::kQueries * personvit::kPanel];
    personvit::panel_distances()(pointers, panels.data(), features, fast);
    personvit::panel_distances_portable(pointers, panels.data(), features, plain);
    CHECK(std::equal(fast, fast + personvit::kQueries * personvit::kPanel, plain));
  }
}

void test_tournament() {
  for (int64_t blocks = 1; blocks < 40; ++blocks) {
    const personvit::Tournament tournament{blocks};
    std::set<std::pair<int64_t, int64_t>> seen;
    for (int64_t round = 0; round < tournament.rounds(); ++round) {
      std::set<int64_t> busy;
      for (int64_t number = 0; number < tournament.pairs(); ++number) {
        int64_t a = -1, b = -1;
        if (!tournament.pair(round, number, &a, &b)) {
          continue;
        }
        CHECK(a >= 0 && a < b && b < blocks);
        CHECK(busy.insert(a).second && busy.insert(b).second);
        CHECK(seen.emplace(a, b).second);
      }
    }
    CHECK(static_cast<int64_t>(seen.size()) == blocks * (blocks - 1) / 2);
  }
}

// The two passes that CUDA launches, and the tiles of the CPU, against a full sort.
void test_knn() {
  std::mt19937 random(2);
  for (int round = 0; round < 120; ++round) {
    const int64_t queries = 1 + below(random, round % 10 == 0 ? 600 : 5), features = 1 + below(random, 40);
    const bool itself = round % 3 == 0;
    const int64_t gallery_rows = itself ? queries : 1 + below(random, round % 10 == 1 ? 600 : 40);
    const int64_t k = 1 + below(random, std::min<int64_t>(gallery_rows, 30));
    const int64_t slice_rows = 1 + below(random, gallery_rows);
    const int64_t slices = (gallery_rows + slice_rows - 1) / slice_rows;
    std::vector<float> query = random_features(random, queries * features, 2);  // few levels: many ties
    if (round % 7 == 0) {
      query[at(below(random, queries * features))] = kNan;
    }
    const std::vector<float> gallery = itself ? query : random_features(random, gallery_rows * features, 2);

    std::vector<float> slice_distances(at(slices * queries * k)), slice_largest(at(slices * queries));
    std::vector<float> distances(at(queries * k)), largest(at(queries));
    std::vector<int64_t> slice_indices(slice_distances.size()), indices(distances.size());
    const personvit::FeatureDistances source{query.data(), gallery.data(), features};
    const personvit::KnnSlices<personvit::FeatureDistances> search{
        source,    slice_distances.data(), slice_indices.data(), slice_largest.data(), queries, gallery_rows, k,
        slice_rows};
    for (int64_t row = 0; row < slices * queries; ++row) {
      search(row);
    }
    const personvit::KnnMerge merge{slice_distances.data(),
                                    slice_indices.data(),
                                    slice_largest.data(),
                                    distances.data(),
                                    indices.data(),
                                    largest.data(),
                                    queries,
                                    k,
                                    slices};

    std::vector<float> cpu_distances(distances.size()), cpu_largest(largest.size());
    std::vector<int64_t> cpu_indices(indices.size());
    const std::vector<float> panels = pack(gallery, gallery_rows, features);
    const personvit::Neighbours found(cpu_distances.data(), cpu_indices.data(), cpu_largest.data(), queries, k);
    found.clear();
    const personvit::NeighbourTile<false> tile{query.data(), panels.data(), queries, gallery_rows, features, &found};
    const personvit::NeighbourTile<true> both{query.data(), panels.data(), queries, gallery_rows, features, &found};
    for (int64_t block = 0; block < personvit::block_count(queries); ++block) {
      for (int64_t other = 0; other < personvit::block_count(gallery_rows); ++other) {
        if (!itself || block == other) {
          tile(block, other);
        } else if (block < other) {
          both(block, other);
        }
      }
    }
    for (int64_t row = 0; row < queries; ++row) {
      found.sort(row);
      merge(row);
      std::vector<std::tuple<bool, float, int64_t>> all;
      float farthest = 0.0f;
      for (int64_t index = 0; index < gallery_rows; ++index) {
        const float distance =
            personvit::squared_distance(query.data() + row * features, gallery.data() + index * features, features);
        all.emplace_back(std::isnan(distance), std::isnan(distance) ? 0.0f : distance, index);
        farthest = std::isnan(distance) ? farthest : std::max(farthest, distance);
      }
      std::sort(all.begin(), all.end());
      for (int64_t n = 0; n < k; ++n) {
        CHECK(indices[at(row * k + n)] == std::get<2>(all[at(n)]));
        CHECK(std::get<0>(all[at(n)]) || distances[at(row * k + n)] == std::get<1>(all[at(n)]));
      }
      CHECK(largest[at(row)] == farthest);
    }
    CHECK(cpu_indices == indices);
    CHECK(std::memcmp(cpu_distances.data(), distances.data(), distances.size() * sizeof(float)) == 0);
    CHECK(cpu_largest == largest);
  }
}

void test_select_nearest() {
  std::mt19937 random(8);
  for (int round = 0; round < 300; ++round) {
    const int64_t size = 1 + below(random, 200), top = 1 + below(random, size);
    const std::vector<float> row = random_features(random, size, round % 2 == 0 ? 5 : 1000);
    std::vector<std::pair<float, int64_t>> all;
    for (int64_t index = 0; index < size; ++index) {
      all.emplace_back(row[at(index)], index);
    }
    std::sort(all.begin(), all.end());
    std::vector<float> distances(at(top));
    std::vector<int64_t> indices(at(top));
    personvit::select_nearest(row.data(), size, top, distances.data(), indices.data());
    for (int64_t n = 0; n < top; ++n) {
      CHECK(distances[at(n)] == all[at(n)].first && indices[at(n)] == all[at(n)].second);
    }
  }
}

// Address space that is reserved but not filled, so that offsets beyond 2^31 elements can be formed.
template <typename T>
class Reserved {
 public:
  explicit Reserved(int64_t count)
      : bytes_(at(count) * sizeof(T)),
        data_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    CHECK(data_ != MAP_FAILED);
  }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  ~Reserved() { munmap(data_, bytes_); }
  T* get() const { return static_cast<T*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

// N > 46,340: N * N does not fit in 31 bits.
void test_large_sets() {
  constexpr int64_t kRows = 47000, kLast = kRows - 1;
  static_assert(kRows * kRows > int64_t{1} << 31);
  const Reserved<float> distances(kRows * kRows);
  float* row = distances.get() + kLast * kRows;
  for (int64_t index = 0; index < kRows; ++index) {
    row[index] = static_cast<float>((index * 7919) % kRows);
  }
  std::vector<int64_t> pids(at(kRows), 1), cameras(at(kRows), 0);
  std::vector<double> precision(at(kRows)), penalty(at(kRows));
  std::vector<int64_t> first(at(kRows)), matches(at(kRows)), query_pids(at(kRows), 2), query_cameras(at(kRows), 1);
  pids[at(kLast)] = pids[1] = 2;
  const personvit::RankCounts score{
      distances.get(), query_pids.data(), pids.data(),    query_cameras.data(), cameras.data(),
      kRows,           precision.data(),  penalty.data(), first.data(),         matches.data()};
  std::vector<int64_t> scratch(at(score.same_identity(kLast)));
  score(kLast, scratch.data());
  CHECK(matches[at(kLast)] == 2);
  CHECK(first[at(kLast)] == 7919 + 1);

  // Neighbour lists and tiles whose offsets pass 2^31 elements: 47,000 lists of 46,000 entries, of which two are used.
  constexpr int64_t kStride = 46000;
  static_assert(kRows * kStride > int64_t{1} << 31);
  const Reserved<int64_t> lists(kRows * kStride);
  int64_t* of_last = lists.get() + kLast * kStride;
  int64_t* of_first = lists.get();
  of_last[0] = kLast;
  of_last[1] = 0;
  of_first[0] = 0;
  of_first[1] = kLast;
  const personvit::NeighbourLists view{lists.get(), kStride};
  int64_t set[2];
  CHECK(view.reciprocal(kLast, 2, set) == 2 && set[0] == kLast && set[1] == 0);

  const Reserved<float> features(kRows * kStride);
  features.get()[kLast * kStride + 5] = 3.0f;
  CHECK(personvit::squared_distance(features.get(), features.get() + kLast * kStride, 8) == 9.0f);
  const float* pointers[personvit::kQueries];
  personvit::query_rows(features.get(), kRows, kLast, kStride, pointers);
  CHECK(pointers[0][5] == 3.0f && pointers[personvit::kQueries - 1] == pointers[0]);

  const Reserved<float> heap_distances(kRows * kStride);
  const Reserved<int64_t> heap_indices(kRows * kStride);
  float largest = 0.0f;
  const personvit::Neighbours found(heap_distances.get(), heap_indices.get(), &largest, 0, kStride);
  heap_distances.get()[kLast * kStride] = 4.0f;
  CHECK(found.limit(kLast) == 4.0f);

  const personvit::Tournament tournament{personvit::block_count(int64_t{1} << 40)};
  int64_t a = 0, b = 0;
  CHECK(tournament.pair(tournament.rounds() - 1, tournament.pairs() - 1, &a, &b));
  CHECK(a >= 0 && a < b && b < tournament.blocks);
}

}  // namespace

int main(int argc, char** argv) {
  const std::pair<const char*, void (*)()> tests[] = {
      {"panels", test_panels},
      {"tournament", test_tournament},
      {"knn", test_knn},
      {"select_nearest", test_select_nearest},
      {"large_sets", test_large_sets},
  };
  for (const auto& [name, test] : tests) {
    if (argc == 2 && std::strcmp(argv[1], name) == 0) {
      test();
      return 0;
    }
  }
  std::fprintf(stderr, "usage: test_neighbours NAME\n");
  return 2;
}
