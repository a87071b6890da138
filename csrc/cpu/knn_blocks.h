// k nearest neighbours on the CPU over tiles of pairs. Without torch, for the sanitizers' sake.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "core/knn.h"
#include "core/top_k.h"
#include "cpu/panels.h"

namespace personvit {

constexpr int64_t kBlockRows =
    240;  // a multiple of kPanel and of kQueries; 240 x 384 floats are a third of an L2 cache

// Whether a distance of the tile [kQueries, kPanel] may be among the nearest of its row or of its column; the largest
// ones are kept on the way. `!(a > b)` lets NaN through to the exact order of TopK.
PERSONVIT_CLONES
inline bool inspect_tile(const float* tile, const float* row_limits, const float* column_limits, float* row_largest,
                         float* column_largest) {
  int found = 0;
  for (int64_t m = 0; m < kQueries; ++m) {
    const float limit = row_limits[m];
    for (int64_t j = 0; j < kPanel; ++j) {
      const float distance = tile[m * kPanel + j];
      found |= static_cast<int>(!(distance > limit)) | static_cast<int>(!(distance > column_limits[j]));
      row_largest[m * kPanel + j] = larger(row_largest[m * kPanel + j], distance);
      column_largest[j] = larger(column_largest[j], distance);
    }
  }
  return found != 0;
}

// Neighbours found so far of all queries, in the arrays of the result: heaps that are always full, at first of nothing.
class Neighbours {
 public:
  Neighbours(float* distances, int64_t* indices, float* largest, int64_t queries, int64_t k)
      : distances_(distances), indices_(indices), largest_(largest), queries_(queries), k_(k) {}

  void clear() const {
    std::fill(distances_, distances_ + queries_ * k_, std::numeric_limits<float>::quiet_NaN());
    std::fill(indices_, indices_ + queries_ * k_, INT64_MAX);  // every pair comes before it
    std::fill(largest_, largest_ + queries_, 0.0f);
  }

  // A distance above it is not among the nearest. NaN: anything may be.
  float limit(int64_t row) const { return distances_[row * k_]; }

  void offer(int64_t row, float distance, int64_t index) const { heap(row).offer(distance, index); }

  void saw(int64_t row, float distance) const { largest_[row] = larger(largest_[row], distance); }

  void sort(int64_t row) const { heap(row).sort(); }

 private:
  TopK heap(int64_t row) const { return TopK(distances_ + row * k_, indices_ + row * k_, k_, k_); }

  float* distances_;  // [Q, k]
  int64_t* indices_;  // [Q, k]
  float* largest_;    // [Q]
  int64_t queries_;
  int64_t k_;
};

// All pairs of a block of queries and a block of panels. With kBoth the query is the gallery's own row: the pair counts
// for both of its ends.
template <bool kBoth>
struct NeighbourTile {
  const float* query;   // [Q, D]
  const float* panels;  // packed gallery
  int64_t queries;
  int64_t gallery_rows;
  int64_t features;
  const Neighbours* found;

  void operator()(int64_t query_block, int64_t gallery_block) const {
    const int64_t begin = query_block * kBlockRows, end = std::min(begin + kBlockRows, queries);
    const int64_t first = gallery_block * kBlockRows, last = std::min(first + kBlockRows, gallery_rows);
    const PanelDistances compute = panel_distances();
    float tile[kQueries * kPanel], row_limits[kQueries], column_limits[kPanel], column_largest[kPanel];
    float row_largest[kBlockRows * kPanel] = {};
    const float* rows[kQueries];
    for (int64_t start = first; start < last; start += kPanel) {
      const int64_t columns = std::min(kPanel, last - start);
      std::fill(column_largest, column_largest + kPanel, 0.0f);
      for (int64_t j = 0; j < kPanel; ++j) {
        column_limits[j] = kBoth && j < columns ? found->limit(start + j) : -1.0f;
      }
      for (int64_t row = begin; row < end; row += kQueries) {
        query_rows(query, end, row, features, rows);
        compute(rows, panels + start * features, features, tile);
        for (int64_t m = 0; m < kQueries; ++m) {
          row_limits[m] = found->limit(std::min(row + m, end - 1));
        }
        if (inspect_tile(tile, row_limits, column_limits, row_largest + (row - begin) * kPanel, column_largest)) {
          offer(tile, row, std::min(kQueries, end - row), start, columns);
          for (int64_t j = 0; kBoth && j < columns; ++j) {
            column_limits[j] = found->limit(start + j);
          }
        }
      }
      for (int64_t j = 0; kBoth && j < columns; ++j) {
        found->saw(start + j, column_largest[j]);
      }
    }
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < kPanel; ++j) {
        found->saw(row, row_largest[(row - begin) * kPanel + j]);
      }
    }
  }

 private:
  void offer(const float* tile, int64_t row, int64_t count, int64_t start, int64_t columns) const {
    for (int64_t m = 0; m < count; ++m) {
      for (int64_t j = 0; j < columns; ++j) {
        const float distance = tile[m * kPanel + j];
        if (!(distance > found->limit(row + m))) {
          found->offer(row + m, distance, start + j);
        }
        if (kBoth && !(distance > found->limit(start + j))) {
          found->offer(start + j, distance, row + m);
        }
      }
    }
  }
};

inline int64_t block_count(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// Pairs of different blocks as a round-robin tournament: in a round every block meets one other, so that no two pairs
// of a round touch the same rows and they may run at once.
struct Tournament {
  int64_t blocks;

  int64_t teams() const { return blocks + blocks % 2; }  // an odd number gets one that does not exist
  int64_t rounds() const { return teams() - 1; }
  int64_t pairs() const { return teams() / 2; }

  // False if one of the two does not exist.
  bool pair(int64_t round, int64_t number, int64_t* a, int64_t* b) const {
    const int64_t ring = teams() - 1;
    *a = number == 0 ? ring : (round + number) % ring;
    *b = (round - number + ring) % ring;
    if (*a > *b) {
      std::swap(*a, *b);
    }
    return *b < blocks;
  }
};

}  // namespace personvit
