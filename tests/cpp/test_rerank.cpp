// Tests of re-ranking and ranking for the sanitizers, over random shapes: every buffer has exactly the size that the
// algorithm may touch, and every result is compared with the shortest way to compute it.
// Usage: test_rerank NAME
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <set>
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

namespace {

using personvit::SparseRows;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

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

void test_bit_set() {
  std::mt19937 random(5);
  for (const int64_t bound : {1, 63, 64, 65, 4095, 4096, 4097, 300000}) {
    personvit::BitSet bits(bound);
    for (int round = 0; round < 3; ++round) {  // drained sets are used again
      std::set<int64_t> expected{0, bound - 1};
      for (int64_t more = below(random, 200); more > 0; --more) {
        expected.insert(below(random, bound));
      }
      for (const int64_t member : expected) {
        bits.insert(member);
        bits.insert(member);
      }
      std::vector<int64_t> found;
      bits.drain([&found](int64_t member) { found.push_back(member); });
      CHECK(found == std::vector<int64_t>(expected.begin(), expected.end()));
    }
    bits.drain([](int64_t) { CHECK(false); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::pair<const char*, void (*)()> tests[] = {
      {"k_reciprocal", test_k_reciprocal},       {"weights", test_weights},
      {"query_expansion", test_query_expansion}, {"jaccard", test_jaccard},
      {"rank_metrics", test_rank_metrics},       {"bit_set", test_bit_set},
  };
  for (const auto& [name, test] : tests) {
    if (argc == 2 && std::strcmp(argv[1], name) == 0) {
      test();
      return 0;
    }
  }
  std::fprintf(stderr, "usage: test_rerank NAME\n");
  return 2;
}
