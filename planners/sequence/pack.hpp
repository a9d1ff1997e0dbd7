// Packing one wave: a micro-batch of disjoint groups whose degrees add up to at most the number of slots.
//
// Sequences are numbered by descending length, so a wave's members in ascending order are its sequences from the longest
// down. `pack` puts them under a time cap by best-fit; `solve` finds the least cap by bisection. Work is counted in
// placements, one for each sequence that is offered to a wave.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace distrain {

using Members = std::vector<int>;
constexpr double NEVER = std::numeric_limits<double>::infinity();
constexpr double PREFERENCES[] = {1, .5, .34, .75};
constexpr int TRIES = 24;          // groups looked at in one bucket: exact for small machines, bounded for large ones
constexpr int PACK_WORK = 16;      // placements that starting a wave is worth

struct Problem {
  int num_slots, num_degrees, num_sequences;
  const int* degree;               // ascending
  const double* capacity;          // tokens of a group of each degree
  double beta;                     // ms of a wave beyond its sequences
  const double* length;            // descending
  const double* times;             // ms of sequence k at degree i: times[k * num_degrees + i]
  std::vector<int> least;          // least degree that holds the sequence
  std::vector<double> area, floor; // least slots * ms, least ms
  // False if a sequence does not fit the widest group.
  bool prepare() {
    for (int k = 0; k < num_sequences; k++) {
      int fits = 0;
      while (fits < num_degrees && length[k] > capacity[fits]) fits++;
      if (fits == num_degrees) return false;
      double slots_ms = NEVER, ms = NEVER;
      for (int i = fits; i < num_degrees; i++) {
        slots_ms = std::min(slots_ms, time(k, i) * degree[i]);
        ms = std::min(ms, time(k, i));
      }
      least.push_back(fits);
      area.push_back(slots_ms);
      floor.push_back(ms);
    }
    return true;
  }
  double time(int k, int i) const { return times[size_t(k) * num_degrees + i]; }
  double memory() const { return capacity[0] / degree[0] * num_slots; }
};

// How a wave is packed. A sequence prefers the least degree at which it takes at most `preference` of the cap; `only`
// restricts the wave to one degree.
struct Style { double preference = 1; int only = -1; };
struct Wave { Members members; double ms = 0, cap = 0; Style style; };
struct Group { int degree; double ms, tokens; };

class Random {                     // splitmix64: the same numbers everywhere
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  double uniform() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return double((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }
  int below(int n) { return int(uniform() * n); }
  bool chance(double p) { return uniform() < p; }
 private:
  uint64_t state_;
};

// Open groups of one degree, by the time they have left, in 64 buckets whose occupancy is one word.
class Open {
 public:
  void reset(double cap) {
    for (; used_; used_ &= used_ - 1) buckets_[__builtin_ctzll(used_)].clear();
    cap_ = cap;
    scale_ = cap > 0 ? 64 / cap : 0;
  }
  bool empty() const { return used_ == 0; }
  void insert(int g, const std::vector<Group>& groups) {
    int b = bucket(groups[g].ms);
    buckets_[b].push_back(g);
    used_ |= 1ull << b;
  }
  // The group with the least time left that takes `ms` more and `tokens` more: taken out, or -1.
  int take(double ms, double tokens, double capacity, const std::vector<Group>& groups) {
    for (uint64_t left = used_ & (~0ull << bucket(cap_ - ms)); left; left &= left - 1) {
      Members& members = buckets_[__builtin_ctzll(left)];
      int found = -1, tries = TRIES;
      for (size_t q = members.size(); q-- > 0 && tries-- > 0;) {
        const Group& group = groups[members[q]];
        if (group.ms + ms <= cap_ && group.tokens + tokens <= capacity &&
            (found < 0 || group.ms > groups[members[found]].ms)) found = int(q);
      }
      if (found < 0) continue;
      int g = members[found];
      members[found] = members.back();
      members.pop_back();
      if (members.empty()) used_ &= ~(left & -left);
      return g;
    }
    return -1;
  }
 private:
  int bucket(double ms) const { return std::clamp(int((cap_ - ms) * scale_), 0, 63); }
  Members buckets_[64];
  uint64_t used_ = 0;
  double cap_ = 0, scale_ = 0;
};

class Packer {
 public:
  explicit Packer(const Problem& problem) : p_(problem), open_(problem.num_degrees) {}

  // No wave of `members` is shorter; NEVER if memory forbids one.
  double lower(const Members& members) const {
    double area = 0, longest = 0, tokens = 0;
    for (int k : members) area += p_.area[k], longest = std::max(longest, p_.floor[k]), tokens += p_.length[k];
    return tokens > p_.memory() ? NEVER : std::max(area / p_.num_slots, longest);
  }

  // Duration of `members` packed under `cap`, or -1 if they do not fit. With `kept`, what does not fit goes to `rest`
  // instead, as does each sequence with probability `skip`.
  double pack(const Members& members, double cap, Style style, Members* kept = nullptr, Members* rest = nullptr,
              double skip = 0, Random* random = nullptr) {
    work += PACK_WORK;
    groups.clear();
    placed.clear();
    used_ = 0;
    double longest = 0, within = cap * (1 + 1e-12), shortest = p_.length[members.back()];
    for (Open& open : open_) open.reset(within);
    int num_open = 0;
    for (size_t q = 0; q < members.size(); q++) {
      int k = members[q];
      if (kept && num_open == 0 && used_ == p_.num_slots) {  // full: nothing else fits
        rest->insert(rest->end(), members.begin() + q, members.end());
        break;
      }
      work++;
      if (skip > 0 && q && random->chance(skip)) { rest->push_back(k); continue; }
      size_t before = groups.size();
      int g = place(k, within, style);
      if (g < 0) {
        if (!kept) return -1;
        rest->push_back(k);
        continue;
      }
      num_open += groups.size() > before;
      Group& group = groups[g];
      group.ms += p_.time(k, group.degree);
      group.tokens += p_.length[k];
      longest = std::max(longest, group.ms);
      placed.push_back(g);
      if (kept) kept->push_back(k);
      if (group.tokens + shortest <= p_.capacity[group.degree]) open_[group.degree].insert(g, groups);
      else num_open--;
    }
    return longest;
  }

  // Packs the wave's members as short as bisection finds; false at once if `limit` is out of reach.
  bool solve(Wave& wave, double limit, int num_styles, double tolerance) {
    double low = lower(wave.members), best = NEVER;
    if (low >= limit) return false;
    for (int s = 0; s < num_styles; s++) {
      Style style{PREFERENCES[s], -1};
      double below = low, cap = best < NEVER ? best * (1 - tolerance) : limit < NEVER ? limit : low * 1.05;
      double ms = pack(wave.members, cap, style);
      if (limit == NEVER && best == NEVER)
        for (int tries = 0; ms < 0 && tries < 16; tries++) below = cap, cap *= 1.15, ms = pack(wave.members, cap, style);
      if (ms < 0) continue;
      best = ms, wave.ms = ms, wave.cap = cap, wave.style = style;
      while (best - below > tolerance * best) {
        cap = below + (best - below) * .5;
        ms = pack(wave.members, cap, style);
        if (ms < 0) below = cap;
        else best = ms, wave.ms = ms, wave.cap = cap;
      }
    }
    return best < NEVER;
  }

  // As solve, with groups of one degree.
  bool single(Wave& wave, int degree, double limit) {
    double sum = 0, low = 0;
    for (int k : wave.members) {
      if (p_.least[k] > degree) return false;
      sum += p_.time(k, degree), low = std::max(low, p_.time(k, degree));
    }
    low = std::max(low, sum / (p_.num_slots / p_.degree[degree]));
    if (low >= limit) return false;
    Style style{1, degree};
    double cap = std::min(limit, sum * (1 + 1e-9)), ms = pack(wave.members, cap, style);
    if (ms < 0) return false;
    wave.ms = ms, wave.cap = cap, wave.style = style;
    while (wave.ms - low > 2e-3 * wave.ms) {
      cap = low + (wave.ms - low) * .5;
      ms = pack(wave.members, cap, style);
      if (ms < 0) low = cap;
      else wave.ms = ms, wave.cap = cap;
    }
    return true;
  }

  std::vector<Group> groups;       // of the last pack
  Members placed;                  // group of each of its members
  int64_t work = 0;

 private:
  // The group that takes sequence k, opened if need be; -1 if none does. Groups up to the preferred degree come first,
  // then a new one; where there is no room for that, wider groups, and a new narrower one.
  int place(int k, double cap, Style style) {
    int first = style.only >= 0 ? std::max(style.only, p_.least[k]) : p_.least[k];
    int last = style.only >= 0 ? style.only + 1 : p_.num_degrees;
    while (first < last && p_.time(k, first) > cap) first++;
    if (first >= last) return -1;
    int preferred = first;
    for (int i = first; i < last && p_.time(k, preferred) > cap * style.preference; i++)
      if (p_.time(k, i) < p_.time(k, preferred)) preferred = i;
    bool room = used_ + p_.degree[preferred] <= p_.num_slots;
    for (int i = first; i < (room ? preferred + 1 : last); i++) {
      if (open_[i].empty() || p_.time(k, i) > cap) continue;
      int g = open_[i].take(p_.time(k, i), p_.length[k], p_.capacity[i], groups);
      if (g >= 0) return g;
    }
    while (!room && --preferred >= first)
      room = used_ + p_.degree[preferred] <= p_.num_slots && p_.time(k, preferred) <= cap;
    if (!room) return -1;
    used_ += p_.degree[preferred];
    groups.push_back({preferred, 0, 0});
    return int(groups.size()) - 1;
  }

  const Problem& p_;
  std::vector<Open> open_;
  int used_ = 0;
};

}  // namespace distrain
