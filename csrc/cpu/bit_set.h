// A set of row numbers as bits: insertion in a few cycles, members in ascending order. Without torch, for the
// sanitizers' sake.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace personvit {

class BitSet {
 public:
  explicit BitSet(int64_t bound)
      : words_(static_cast<size_t>((bound + 63) / 64)), used_words_((words_.size() + 63) / 64) {}

  void insert(int64_t value) {
    const auto word = static_cast<size_t>(value) / 64;
    words_[word] |= uint64_t{1} << (value % 64);
    used_words_[word / 64] |= uint64_t{1} << (word % 64);
  }

  // Calls take(member) for all members, ascending, and leaves the set empty. Looks at the words in use only: to look at
  // every word of a set for each of N sets would cost N * N / 64.
  template <typename Take>
  void drain(const Take& take) {
    for (size_t group = 0; group < used_words_.size(); ++group) {
      for (uint64_t used = used_words_[group]; used != 0; used &= used - 1) {
        const size_t word = group * 64 + static_cast<size_t>(__builtin_ctzll(used));
        for (uint64_t bits = words_[word]; bits != 0; bits &= bits - 1) {
          take(static_cast<int64_t>(word) * 64 + __builtin_ctzll(bits));
        }
        words_[word] = 0;
      }
      used_words_[group] = 0;
    }
  }

 private:
  std::vector<uint64_t> words_;
  std::vector<uint64_t> used_words_;  // bit w: words_[w] is not 0
};

}  // namespace personvit
