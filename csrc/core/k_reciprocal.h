// Reciprocal neighbour sets and their expansion (Zhong et al., Re-ranking Person Re-identification with k-reciprocal
// Encoding, 2017, equations 2 and 3).
//
// Row j of the neighbour lists holds j's nearest points, as a rule with j itself among them. R(i, k) are the points of
// the first k + 1 of row i that have i among the first k + 1 of their own row.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace personvit {

// h = k1 / 2, a half rounded to the even neighbour as numpy does: 3 -> 2, 5 -> 2, 7 -> 4.
PERSONVIT_HD inline int64_t half_neighbours(int64_t k1) {
  const int64_t half = k1 / 2;
  return k1 % 2 == 1 && half % 2 == 1 ? half + 1 : half;
}

struct NeighbourLists {
  const int64_t* neighbours;  // [N, stride]
  int64_t stride;

  PERSONVIT_HD const int64_t* row(int64_t index) const { return neighbours + index * stride; }

  PERSONVIT_HD bool holds(int64_t index, int64_t width, int64_t value) const {
    const int64_t* list = row(index);
    int64_t found = 0;
    for (int64_t at = 0; at < width; ++at) {
      found += list[at] == value ? 1 : 0;  // no early exit: the loop is short and vectorises
    }
    return found != 0;
  }

  // Writes R(index, width - 1) in the order of the list, returns its size, at most width.
  PERSONVIT_HD int64_t reciprocal(int64_t index, int64_t width, int64_t* set) const {
    int64_t size = 0;
    for (int64_t at = 0; at < width; ++at) {
      const int64_t candidate = row(index)[at];
      if (holds(candidate, width, index)) {
        set[size++] = candidate;
      }
    }
    return size;
  }
};

// Sets of R(j, h) of all j, in rows of fixed width that -1 fills up.
struct HalfReciprocal {
  NeighbourLists lists;
  int64_t width;  // h + 1, cut to the length of the lists
  int64_t* sets;  // [N, width]

  PERSONVIT_HD void operator()(int64_t row) const {
    int64_t* set = sets + row * width;
    for (int64_t at = lists.reciprocal(row, width, set); at < width; ++at) {
      set[at] = -1;
    }
  }
};

// An ascending set in memory of the caller.
struct SortedSet {
  int64_t* members;
  int64_t size;

  PERSONVIT_HD void insert(int64_t value) {
    int64_t low = 0, high = size;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (members[middle] < value) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low < size && members[low] == value) {
      return;
    }
    for (int64_t at = size; at > low; --at) {
      members[at] = members[at - 1];
    }
    members[low] = value;
    ++size;
  }
};

// R*(i): R(i, k1), and R(j, h) of each of its points j where more than two thirds of R(j, h) lie in R(i, k1).
struct ExpandedSets {
  NeighbourLists lists;
  int64_t width;             // k1 + 1, cut to the length of the lists
  const int64_t* half_sets;  // [N, half_width], of HalfReciprocal
  int64_t half_width;

  // Room that a set may need.
  PERSONVIT_HD int64_t capacity(int64_t rows) const {
    const int64_t most = width * (1 + half_width);
    return most < rows ? most : rows;
  }

  // Inserts the members of R*(row) into a set that is empty; mutual [width] is scratch.
  template <typename Set>
  PERSONVIT_HD void operator()(int64_t row, int64_t* mutual, Set* set) const {
    const int64_t count = lists.reciprocal(row, width, mutual);
    for (int64_t at = 0; at < count; ++at) {
      set->insert(mutual[at]);
    }
    for (int64_t at = 0; at < count; ++at) {
      const int64_t* half = half_sets + mutual[at] * half_width;
      int64_t length = 0, common = 0;
      for (; length < half_width && half[length] >= 0; ++length) {
        for (int64_t other = 0; other < count; ++other) {
          common += mutual[other] == half[length] ? 1 : 0;
        }
      }
      if (3 * common > 2 * length && common < length) {  // otherwise it brings nothing new
        for (int64_t member = 0; member < length; ++member) {
          set->insert(half[member]);
        }
      }
    }
  }
};

// Two passes where memory for the sets has to be known before they are written. Row number r of a pass is set
// first + r; both have scratch for their own rows only.
struct ExpandedSizes {
  ExpandedSets expand;
  int64_t* mutual;   // [passed rows, width]
  int64_t* members;  // [passed rows, capacity]
  int64_t capacity;
  int64_t first;
  int64_t* sizes;  // [passed rows]

  PERSONVIT_HD void operator()(int64_t row) const {
    SortedSet set{members + row * capacity, 0};
    expand(first + row, mutual + row * expand.width, &set);
    sizes[row] = set.size;
  }
};

struct ExpandedMembers {
  ExpandedSets expand;
  int64_t* mutual;        // [passed rows, width]
  const int64_t* indptr;  // [N + 1]
  int64_t first;
  int64_t* indices;  // [nnz]

  PERSONVIT_HD void operator()(int64_t row) const {
    SortedSet set{indices + indptr[first + row], 0};
    expand(first + row, mutual + row * expand.width, &set);
  }
};

}  // namespace personvit
