// Average precision and inverse negative penalty of one query by counting: the rank of a match is one plus the gallery
// entries that come before it, so nothing but the matches is ever sorted.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace personvit {

// Number of i in [begin, end) with row[i] < limit, or <= limit.
template <bool kOrEqual>
PERSONVIT_HD inline int64_t count_below(const float* row, int64_t begin, int64_t end, float limit) {
  constexpr int64_t kChunk = 1 << 12;  // 32-bit counters inside: twice as many fit in a register
  int64_t total = 0;
  for (int64_t start = begin; start < end; start += kChunk) {
    const int64_t stop = start + kChunk < end ? start + kChunk : end;
    int32_t count = 0;
    for (int64_t index = start; index < stop; ++index) {
      count += (kOrEqual ? row[index] <= limit : row[index] < limit) ? 1 : 0;
    }
    total += count;
  }
  return total;
}

PERSONVIT_HD inline bool ranks_before(const float* row, int64_t a, int64_t b) {
  return row[a] < row[b] || (row[a] == row[b] && a < b);
}

// Sorts ascending in place: a heap, without recursion.
PERSONVIT_HD inline void sort_ranks(int64_t* ranks, int64_t size) {
  for (int64_t last = size, root = size / 2; last > 1;) {
    int64_t value;
    if (root > 0) {
      value = ranks[--root];
    } else {
      value = ranks[--last];
      ranks[last] = ranks[0];
    }
    int64_t at = root;
    for (int64_t child = 2 * at + 1; child < last; child = 2 * at + 1) {
      if (child + 1 < last && ranks[child] < ranks[child + 1]) {
        ++child;
      }
      if (ranks[child] <= value) {
        break;
      }
      ranks[at] = ranks[child];
      at = child;
    }
    ranks[at] = value;
  }
}

struct RankCounts {
  const float* distances;  // [Q, G]
  const int64_t* query_pids;
  const int64_t* gallery_pids;
  const int64_t* query_cameras;
  const int64_t* gallery_cameras;
  int64_t gallery_rows;
  double* average_precision;  // [Q], 0 for a query without a match
  double* inverse_penalty;    // [Q], likewise
  int64_t* first_match;       // [Q] rank from 1, likewise; -1 if the row holds NaN
  int64_t* matches;           // [Q]

  // Gallery entries of the query's identity: what the scratch of a query has to hold.
  PERSONVIT_HD int64_t same_identity(int64_t query) const {
    const int64_t pid = query_pids[query];
    int64_t count = 0;
    for (int64_t index = 0; index < gallery_rows; ++index) {
      count += gallery_pids[index] == pid ? 1 : 0;
    }
    return count;
  }

  // scratch [same_identity(query)].
  PERSONVIT_HD void operator()(int64_t query, int64_t* scratch) const {
    const float* row = distances + query * gallery_rows;
    const int64_t pid = query_pids[query], camera = query_cameras[query];
    const int64_t total = same_identity(query);
    // Matches from the front, junk (the same camera; it is taken out of the gallery) from the back.
    int64_t found = 0, junk = total;
    for (int64_t index = 0; index < gallery_rows && found < junk; ++index) {
      if (gallery_pids[index] == pid) {
        scratch[gallery_cameras[index] == camera ? --junk : found++] = index;
      }
    }
    int64_t numbers = 0;
    for (int64_t index = 0; index < gallery_rows; ++index) {
      numbers += row[index] == row[index] ? 1 : 0;
    }
    average_precision[query] = inverse_penalty[query] = 0.0;
    first_match[query] = numbers == gallery_rows ? 0 : -1;
    matches[query] = found;
    if (found == 0 || numbers != gallery_rows) {
      return;
    }
    for (int64_t at = 0; at < found; ++at) {
      const int64_t index = scratch[at];
      int64_t rank = 1 + count_below<true>(row, 0, index, row[index]) +
                     count_below<false>(row, index + 1, gallery_rows, row[index]);
      for (int64_t other = junk; other < total; ++other) {
        rank -= ranks_before(row, scratch[other], index) ? 1 : 0;
      }
      scratch[at] = rank;
    }
    sort_ranks(scratch, found);
    double sum = 0.0;
    for (int64_t at = 0; at < found; ++at) {
      sum += static_cast<double>(at + 1) / static_cast<double>(scratch[at]);
    }
    average_precision[query] = sum / static_cast<double>(found);
    inverse_penalty[query] = static_cast<double>(found) / static_cast<double>(scratch[found - 1]);
    first_match[query] = scratch[0];
  }
};

}  // namespace personvit
