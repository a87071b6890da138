// A set of row numbers as bits: insertion in a few cycles, members in ascending order. Without torch, for the
// sanitizers' sake.
#pragma once

#include <cstdint>
#include <vector>

namespace personvit {

class BitSet {
 public:
  explicit BitSet(int64_t bound) : words_(static_cast<size_t>((bound + 63) / 64)) {}

  void insert(int64_t value) { words_[static_cast<size_t>(value) / 64] |= uint64_t{1} << (value % 64); }

  // Calls take(member) for all members, ascending, and leaves the set empty.
  template <typename Take>
  void drain(const Take& take) {
    for (size_t word = 0; word < words_.size(); ++word) {
      for (uint64_t bits = words_[word]; bits != 0; bits &= bits - 1) {
        take(static_cast<int64_t>(word) * 64 + __builtin_ctzll(bits));
      }
      words_[word] = 0;
    }
  }

 private:
  std::vector<uint64_t> words_;
};

}  // namespace personvit
