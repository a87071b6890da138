// Tests of the retrieval algorithms for the sanitizers, over random shapes: every buffer has exactly the size that the
// algorithm may touch, and every result is compared with the shortest way to compute it.
// Usage: test_retrieval NAME
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "core/jaccard.h"
#include "core/k_reciprocal.h"
#include "core/knn.h"
#include "core/query_expansion.h"
#include "core/rank_metrics.h"
#include "core/reciprocal_weights.h"
#include "cpu/bit_set.h"
#include "cpu/entry_distances.h"
#include "cpu/expand_rows.h"
#include "cpu/inverted_index.h"
#include "cpu/knn_blocks.h"

namespace {

using personvit::SparseRows;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int64_t below(std::mt19937& random, int64_t bound) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(bound));
}

size_t at(int64_t index) { return static_cast<size_t>(index); }

std::vector<float> pack(const std::vector<float>& gallery, int64_t rows, int64_t features) {
  std::vector<float> panels(at(personvit::panel_count(rows) * personvit::kPanel * features));
  for (int64_t panel = 0; panel < personvit::panel_count(rows); ++panel) {
    personvit::pack_panel(gallery.data(), rows, panel * personvit::kPanel, features,
                          panels.data() + panel * personvit::kPanel * features);
  }
  return panels;
}

// Nearest neighbours of a set among itself by a full sort. [N, k]
std::vector<int64_t> neighbours_of(const std::vector<float>& points, int64_t rows, int64_t features, int64_t k) {
  std::vector<int64_t> lists;
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<std::pair<float, int64_t>> all;
    for (int64_t other = 0; other < rows; ++other) {
      all.emplace_back(
          personvit::squared_distance(points.data() + row * features, points.data() + other * features, features),
          other);
    }
    std::sort(all.begin(), all.end());
    for (int64_t n = 0; n < k; ++n) {
      lists.push_back(all[at(n)].second);
    }
  }
  return lists;
}

struct Sparse {
  std::vector<int64_t> indptr{0};
  std::vector<int64_t> indices;
  std::vector<float> values;

  SparseRows view() const { return {indptr.data(), indices.data(), values.data()}; }
};

Sparse random_sparse(std::mt19937& random, int64_t rows, int64_t columns) {
  Sparse matrix;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      if (random() % 3 == 0) {
        matrix.indices.push_back(column);
        matrix.values.push_back(static_cast<float>(1 + random() % 100) / 700.0f);
      }
    }
    matrix.indptr.push_back(static_cast<int64_t>(matrix.indices.size()));
  }
  return matrix;
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

void test_k_reciprocal() {
  CHECK(personvit::half_neighbours(1) == 0 && personvit::half_neighbours(3) == 2);
  CHECK(personvit::half_neighbours(5) == 2 && personvit::half_neighbours(7) == 4);
  CHECK(personvit::half_neighbours(20) == 10 && personvit::half_neighbours(50) == 25);
  std::mt19937 random(4);
  for (int round = 0; round < 150; ++round) {
    const int64_t rows = 1 + below(random, 60), features = 1 + below(random, 4), k1 = 1 + below(random, 70);
    const std::vector<float> points = random_features(random, rows * features, round % 2 == 0 ? 2 : 1000);
    const int64_t stride = std::min(k1 + 1, rows);
    const std::vector<int64_t> lists = neighbours_of(points, rows, features, stride);
    const int64_t half_width = std::min(personvit::half_neighbours(k1) + 1, stride);

    const auto reciprocal = [&](int64_t point, int64_t width) {
      std::set<int64_t> set;
      for (int64_t n = 0; n < width; ++n) {
        const int64_t other = lists[at(point * stride + n)];
        const int64_t* list = lists.data() + other * stride;
        if (std::find(list, list + width, point) != list + width) {
          set.insert(other);
        }
      }
      return set;
    };
    std::vector<int64_t> half_sets(at(rows * half_width));
    const personvit::NeighbourLists view{lists.data(), stride};
    const personvit::HalfReciprocal half{view, half_width, half_sets.data()};
    for (int64_t row = 0; row < rows; ++row) {
      half(row);
    }
    const personvit::ExpandedSets expand{view, stride, half_sets.data(), half_width};
    personvit::BitSet bits(rows);
    for (int64_t row = 0; row < rows; ++row) {
      const std::set<int64_t> mutual = reciprocal(row, stride);
      std::set<int64_t> expected = mutual;
      for (const int64_t other : mutual) {
        const std::set<int64_t> other_half = reciprocal(other, half_width);
        const auto common = std::count_if(other_half.begin(), other_half.end(),
                                          [&](int64_t member) { return mutual.count(member) != 0; });
        if (static_cast<double>(common) > 2.0 / 3.0 * static_cast<double>(other_half.size())) {
          expected.insert(other_half.begin(), other_half.end());
        }
      }
      std::vector<int64_t> scratch(at(stride)), members(at(expand.capacity(rows)));
      int64_t size = -1;
      const personvit::ExpandedSizes sizes{expand, scratch.data(), members.data(), expand.capacity(rows), row, &size};
      sizes(0);
      CHECK(size == static_cast<int64_t>(expected.size()));
      std::vector<int64_t> indptr(at(row + 2)), exact(expected.size());
      indptr[at(row + 1)] = size;
      personvit::ExpandedMembers{expand, scratch.data(), indptr.data(), row, exact.data()}(0);
      CHECK(exact == std::vector<int64_t>(expected.begin(), expected.end()));
      personvit::SortedSet sorted{members.data(), 0};
      expand(row, scratch.data(), &sorted);
      expand(row, scratch.data(), &bits);
      CHECK(std::vector<int64_t>(members.begin(), members.begin() + sorted.size) ==
            std::vector<int64_t>(expected.begin(), expected.end()));
      auto next = expected.begin();
      bits.drain([&](int64_t member) { CHECK(next != expected.end() && member == *next++); });
      CHECK(next == expected.end());
    }
  }
}

void test_weights() {
  std::mt19937 random(5);
  for (int round = 0; round < 100; ++round) {
    const int64_t rows = 1 + below(random, 30), features = 1 + below(random, 20);
    const std::vector<float> points = random_features(random, rows * features, round % 5 == 0 ? 1 : 1000);
    Sparse sets = random_sparse(random, rows, rows);
    std::vector<float> largest(at(rows));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t other = 0; other < rows; ++other) {
        largest[at(row)] = personvit::larger(
            largest[at(row)],
            personvit::squared_distance(points.data() + row * features, points.data() + other * features, features));
      }
    }
    const personvit::EntryDistances entries{points.data(), sets.indptr.data(), sets.indices.data(), features,
                                            sets.values.data()};
    const personvit::ReciprocalWeights weigh{largest.data(), sets.indptr.data(), sets.values.data()};
    for (int64_t row = 0; row < rows; ++row) {
      personvit::entry_distances(entries, row);
      const std::vector<float> distances = sets.values;
      weigh(row);
      double sum = 0.0, total = 0.0;
      for (int64_t n = sets.indptr[at(row)]; n < sets.indptr[at(row + 1)]; ++n) {
        total += std::exp(largest[at(row)] > 0.0f ? -static_cast<double>(distances[at(n)]) / largest[at(row)] : 0.0);
        sum += sets.values[at(n)];
      }
      for (int64_t n = sets.indptr[at(row)]; n < sets.indptr[at(row + 1)]; ++n) {
        const double exact =
            std::exp(largest[at(row)] > 0.0f ? -static_cast<double>(distances[at(n)]) / largest[at(row)] : 0.0) / total;
        CHECK(std::abs(sets.values[at(n)] / exact - 1.0) < 1e-6);
      }
      CHECK(sets.indptr[at(row)] == sets.indptr[at(row + 1)] || std::abs(sum - 1.0) < 1e-6);
    }
  }
}

void test_query_expansion() {
  std::mt19937 random(6);
  for (int round = 0; round < 150; ++round) {
    const int64_t rows = 1 + below(random, 50), stride = 1 + below(random, rows), count = 1 + below(random, stride);
    const Sparse matrix = random_sparse(random, rows, rows);
    std::vector<int64_t> neighbours(at(rows * stride));
    for (int64_t& neighbour : neighbours) {
      neighbour = below(random, rows);  // even one that comes twice
    }
    const personvit::QueryExpansion expand{matrix.view(), neighbours.data(), stride, count};
    personvit::DenseExpansion dense(expand, rows);
    for (int64_t row = 0; row < rows; ++row) {
      std::map<int64_t, float> expected;
      for (int64_t n = 0; n < count; ++n) {
        const int64_t source = neighbours[at(row * stride + n)];
        for (int64_t entry = matrix.indptr[at(source)]; entry < matrix.indptr[at(source + 1)]; ++entry) {
          expected[matrix.indices[at(entry)]] += matrix.values[at(entry)];
        }
      }
      std::vector<int64_t> cursors(at(count)), indices(at(expand.capacity(row))), dense_indices;
      std::vector<float> values(indices.size()), dense_values;
      int64_t size = -1;
      personvit::ExpansionSizes{expand, cursors.data(), row, &size}(0);
      std::vector<int64_t> indptr(at(row + 2));
      indptr[at(row + 1)] = size;
      personvit::ExpansionEntries{expand, cursors.data(), indptr.data(), row, indices.data(), values.data()}(0);
      CHECK(dense(row, &dense_indices, &dense_values) == size);
      CHECK(size == static_cast<int64_t>(expected.size()));
      int64_t n = 0;
      for (const auto& [column, sum] : expected) {
        CHECK(indices[at(n)] == column && dense_indices[at(n)] == column);
        CHECK(values[at(n)] == sum / static_cast<float>(count) && dense_values[at(n)] == values[at(n)]);
        ++n;
      }
    }
  }
}

void test_jaccard() {
  std::mt19937 random(7);
  for (int round = 0; round < 150; ++round) {
    const int64_t rows = 1 + below(random, 50), queries = below(random, rows + 1), gallery_rows = rows - queries;
    const Sparse matrix = random_sparse(random, rows, rows);
    const int64_t entries = matrix.indptr[at(rows)] - matrix.indptr[at(queries)];
    std::vector<int64_t> offsets(at(rows + 1));
    std::vector<int32_t> index_rows(at(entries));
    std::vector<float> weights(at(entries));
    personvit::invert_columns(matrix.view(), queries, rows, rows, offsets.data(), index_rows.data(), weights.data());
    const personvit::InvertedIndex index{offsets.data(), index_rows.data(), weights.data()};
    for (int64_t query = 0; query < queries; ++query) {
      std::vector<float> overlap(at(gallery_rows)), shared(at(gallery_rows));
      personvit::add_overlap(matrix.view(), index, query, overlap.data(), 0, 1, personvit::NoBarrier());
      for (int64_t row = 0; row < gallery_rows; ++row) {
        float expected = 0.0f;
        for (int64_t a = matrix.indptr[at(query)]; a < matrix.indptr[at(query + 1)]; ++a) {
          for (int64_t b = matrix.indptr[at(queries + row)]; b < matrix.indptr[at(queries + row + 1)]; ++b) {
            if (matrix.indices[at(a)] == matrix.indices[at(b)]) {
              expected += std::min(matrix.values[at(a)], matrix.values[at(b)]);
            }
          }
        }
        CHECK(overlap[at(row)] == expected);
        const float distance = personvit::jaccard_distance(expected);
        CHECK(distance >= 0.0f && distance <= 1.0f);
      }
      // Three lanes, as a block of threads shares a query: column by column.
      for (int64_t n = matrix.indptr[at(query)]; n < matrix.indptr[at(query + 1)]; ++n) {
        const int64_t column[2] = {n, n + 1};
        const SparseRows one{column, matrix.indices.data(), matrix.values.data()};
        for (int64_t lane = 2; lane >= 0; --lane) {
          personvit::add_overlap(one, index, 0, shared.data(), lane, 3, personvit::NoBarrier());
        }
      }
      CHECK(shared == overlap);
    }
  }
  CHECK(personvit::jaccard_distance(0.0f) == 1.0f && personvit::jaccard_distance(1.0000001f) == 0.0f);
  const personvit::Blend blend = personvit::make_blend(0.25);
  CHECK(blend(0.0f, 1.0f, 2.0f) == 0.875f && blend(1.0f, 1.0f, 0.0f) == 0.0f);
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

void test_rank_metrics() {
  std::mt19937 random(9);
  for (int64_t size = 0; size < 60; ++size) {
    std::vector<int64_t> ranks(at(size));
    for (int64_t& rank : ranks) {
      rank = below(random, 30);
    }
    std::vector<int64_t> expected = ranks;
    std::sort(expected.begin(), expected.end());
    personvit::sort_ranks(ranks.data(), size);
    CHECK(ranks == expected);
  }
  for (int round = 0; round < 400; ++round) {
    const int64_t rows = below(random, 60), pids = 1 + below(random, 5), cameras = 1 + below(random, 3);
    std::vector<float> distances = random_features(random, rows, round % 2 == 0 ? 6 : 100000);
    const bool broken = rows > 0 && round % 20 == 0;
    if (broken) {
      distances[at(below(random, rows))] = kNan;
    }
    std::vector<int64_t> gallery_pids, gallery_cameras;
    for (int64_t row = 0; row < rows; ++row) {
      gallery_pids.push_back(below(random, pids));
      gallery_cameras.push_back(below(random, cameras));
    }
    const int64_t pid = below(random, pids), camera = below(random, cameras);
    double precision = -1.0, penalty = -1.0;
    int64_t first = -2, matches = -1;
    const personvit::RankCounts score{
        distances.data(), &pid,    gallery_pids.data(), &camera, gallery_cameras.data(), rows, &precision, &penalty,
        &first,           &matches};
    std::vector<int64_t> scratch(at(score.same_identity(0)));
    score(0, scratch.data());
    std::vector<std::pair<float, int64_t>> kept;
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const bool same = gallery_pids[at(row)] == pid;
      count += same && gallery_cameras[at(row)] != camera ? 1 : 0;
      if (!(same && gallery_cameras[at(row)] == camera)) {
        kept.emplace_back(distances[at(row)], row);
      }
    }
    CHECK(matches == count);
    if (broken || count == 0) {
      CHECK(precision == 0.0 && penalty == 0.0 && first == (broken ? -1 : 0));
      continue;
    }
    std::sort(kept.begin(), kept.end());
    int64_t hits = 0, first_hit = 0, last = 0;
    double sum = 0.0;
    for (size_t n = 0; n < kept.size(); ++n) {
      if (gallery_pids[at(kept[n].second)] == pid) {
        last = static_cast<int64_t>(n) + 1;
        first_hit = hits == 0 ? last : first_hit;
        sum += static_cast<double>(++hits) / static_cast<double>(last);
      }
    }
    CHECK(precision == sum / static_cast<double>(count));
    CHECK(penalty == static_cast<double>(count) / static_cast<double>(last));
    CHECK(first == first_hit);
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
      {"k_reciprocal", test_k_reciprocal},
      {"weights", test_weights},
      {"query_expansion", test_query_expansion},
      {"jaccard", test_jaccard},
      {"select_nearest", test_select_nearest},
      {"rank_metrics", test_rank_metrics},
      {"large_sets", test_large_sets},
  };
  for (const auto& [name, test] : tests) {
    if (argc == 2 && std::strcmp(argv[1], name) == 0) {
      test();
      return 0;
    }
  }
  std::fprintf(stderr, "usage: test_retrieval NAME\n");
  return 2;
}
