// The best lock-step plan of a few sequences, by looking at every plan: three dynamic programs over their subsets.
//
//   slots(S)   least slots on which the set S is computed within a given time: some group of its first sequence and
//              some others, on the narrowest degree in time, beside the least slots for the rest
//   wave(S)    least time with slots(S) <= N, by bisection over the times that groups can take
//   plan(S)    a wave of its first sequence and some others, and the best plan of the rest
//
// Heuristics come close on average; where memory is full to the last token they can be far off, and few sequences are
// where that happens.

#pragma once

#include "pack.hpp"

namespace distrain {

class Exact {
 public:
  static constexpr int MOST = 12;  // sequences
  // What it takes, in placements.
  static int64_t work(int num_sequences) { return int64_t(1) << (2 * std::min(num_sequences, 31)); }

  explicit Exact(const Problem& problem) : p_(problem), all_((1u << p_.num_sequences) - 1) {}

  // Wave, group and degree of every sequence; ms of the step.
  double solve(int* wave, int* group, int* degree) {
    measure();
    waves();
    std::vector<Set> first(all_ + 1, 0);
    std::vector<double> plan(all_ + 1, 0);
    for (Set s = 1; s <= all_; s++) {
      plan[s] = NEVER;
      parts(s, [&](Set part) {
        double ms = wave_[part] + p_.beta + plan[s ^ part];
        if (ms < plan[s]) plan[s] = ms, first[s] = part;
      });
    }
    int num = 0;
    for (Set s = all_; s; s ^= first[s]) {
      within(first[s], wave_[first[s]]);
      int num_groups = 0;
      for (Set rest = first[s]; rest; rest ^= group_[rest], num_groups++)
        for (int k = 0; k < p_.num_sequences; k++)
          if (group_[rest] >> k & 1) wave[k] = num, group[k] = num_groups, degree[k] = narrowest_[group_[rest]];
      num++;
    }
    return plan[all_];
  }

 private:
  using Set = uint32_t;

  // Calls `each` with the subsets of `s` that hold its first sequence.
  template <class Each>
  static void parts(Set s, Each each) {
    Set others = s & (s - 1);
    for (Set part = others;; part = (part - 1) & others) {
      each(part | (s ^ others));
      if (!part) return;
    }
  }

  // Times of all groups, NEVER where memory is too small.
  void measure() {
    times_.assign(size_t(all_ + 1) * p_.num_degrees, 0);
    std::vector<double> tokens(all_ + 1, 0);
    for (Set s = 1; s <= all_; s++) {
      int k = __builtin_ctz(s);
      tokens[s] = tokens[s & (s - 1)] + p_.length[k];
      for (int i = 0; i < p_.num_degrees; i++) {
        double ms = sum(s & (s - 1), i) + p_.time(k, i);
        times_[size_t(s) * p_.num_degrees + i] = tokens[s] <= p_.capacity[i] ? ms : NEVER;
        if (tokens[s] <= p_.capacity[i]) steps_.push_back(ms);
      }
    }
    std::sort(steps_.begin(), steps_.end());
    steps_.erase(std::unique(steps_.begin(), steps_.end()), steps_.end());
  }
  double sum(Set s, int i) const { return times_[size_t(s) * p_.num_degrees + i]; }

  void waves() {
    slots_.assign(all_ + 1, 0), group_.assign(all_ + 1, 0), narrowest_.assign(all_ + 1, 0);
    std::vector<size_t> least(all_ + 1, 0);  // index of the time of each wave
    wave_.assign(all_ + 1, 0);
    for (Set s = 1; s <= all_; s++) {
      size_t low = 0, high = steps_.size();
      for (int k = 0; k < p_.num_sequences; k++)  // a wave takes no less than a part of it
        if (s >> k & 1) low = std::max(low, least[s ^ (1u << k)]);
      for (size_t middle = low; low < high; middle = (low + high) / 2) {
        if (within(s, steps_[middle])) high = middle;
        else low = middle + 1;
      }
      least[s] = low;
      wave_[s] = low < steps_.size() ? steps_[low] : NEVER;
    }
  }

  // Whether a wave of `s` takes at most `ms`; leaves its groups in `group_` and their degrees in `narrowest_`.
  bool within(Set s, double ms) {
    Set t = 0;
    do {                           // ascending: parts come before what they are part of
      t = (t - s) & s;
      narrowest_[t] = 0;
      while (narrowest_[t] < p_.num_degrees && !(sum(t, narrowest_[t]) <= ms)) narrowest_[t]++;
      slots_[t] = int64_t(1) << 40;
      parts(t, [&](Set part) {
        if (narrowest_[part] == p_.num_degrees) return;
        int64_t slots = p_.degree[narrowest_[part]] + slots_[t ^ part];
        if (slots < slots_[t]) slots_[t] = slots, group_[t] = part;
      });
    } while (t != s);
    return slots_[s] <= p_.num_slots;
  }

  const Problem& p_;
  const Set all_;
  std::vector<double> times_, steps_, wave_;
  std::vector<int64_t> slots_;
  std::vector<Set> group_;
  Members narrowest_;
};

}  // namespace distrain
