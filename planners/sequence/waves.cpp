// Lock-step plans by waves: which sequences share a micro-batch, and in groups of which degrees.
//
// A wave is a micro-batch: disjoint groups whose degrees add up to at most the number of slots. Sequences are numbered
// by descending length, so a wave's members in ascending order are its sequences from the longest down.
//
//   pack     descending best-fit under a time cap        solve    least cap by bisection
//   build    waves of a target duration, longest first   improve  annealed exchanges, and refills of pooled waves
//
// Work is counted in placements (one sequence offered to one wave), and the search ends after a given amount of it: the
// same plan on every machine. The clock is only a guard. Nothing here is global; a call owns all of its state.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using Members = std::vector<int>;
constexpr double NEVER = std::numeric_limits<double>::infinity();
constexpr double PREFERENCES[] = {1, .5, .34, .75};
constexpr int TRIES = 24;          // groups looked at in one bucket: exact for small machines, bounded for large ones
constexpr size_t STARTS = 4;       // plans that are improved side by side
constexpr size_t MOST_WAVES = 100000;

struct Problem {
  int num_slots, num_degrees, num_sequences;
  const int* degree;               // ascending
  const double* capacity;          // tokens of a group of each degree
  double beta;                     // ms of a wave beyond its sequences
  const double* length;            // descending
  const double* times;             // ms of sequence k at degree i: times[k * num_degrees + i]
  std::vector<int> least;          // least degree that holds the sequence
  std::vector<double> area, floor; // least slots * ms, least ms
  double time(int k, int i) const { return times[size_t(k) * num_degrees + i]; }
};

// How a wave is packed. A sequence prefers the least degree at which it takes at most `preference` of the cap; `only`
// restricts the wave to one degree.
struct Style { double preference = 1; int only = -1; };
struct Wave { Members members; double ms = 0, cap = 0; Style style; };
struct Plan { std::vector<Wave> waves; double ms = NEVER; };
struct Group { int degree; double ms, tokens; };

class Random {                     // splitmix64
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
    for (uint64_t left = used_; left; left &= left - 1) buckets_[__builtin_ctzll(left)].clear();
    used_ = 0;
    cap_ = cap;
    scale_ = cap > 0 ? 64 / cap : 0;
  }
  void insert(int g, const std::vector<Group>& groups) { put(bucket(groups[g].ms), g); }
  // The group with the least time left that takes `ms` more and `tokens` more: taken out, or -1.
  int take(double ms, double tokens, double capacity, const std::vector<Group>& groups) {
    for (uint64_t left = used_ & (~0ull << bucket(cap_ - ms)); left; left &= left - 1) {
      Members& bucket = buckets_[__builtin_ctzll(left)];
      int found = -1, tries = TRIES;
      for (size_t q = bucket.size(); q-- > 0 && tries-- > 0;) {
        const Group& group = groups[bucket[q]];
        if (group.ms + ms <= cap_ && group.tokens + tokens <= capacity &&
            (found < 0 || group.ms > groups[bucket[found]].ms)) found = int(q);
      }
      if (found < 0) continue;
      int g = bucket[found];
      bucket[found] = bucket.back();
      bucket.pop_back();
      if (bucket.empty()) used_ &= ~(left & -left);
      return g;
    }
    return -1;
  }
  bool empty() const { return used_ == 0; }
 private:
  // A group with `ms` used lies in the bucket of its time left; a query starts at the bucket of the time it needs.
  int bucket(double ms) const { return std::clamp(int((cap_ - ms) * scale_), 0, 63); }
  void put(int b, int g) { buckets_[b].push_back(g); used_ |= 1ull << b; }
  Members buckets_[64];
  uint64_t used_ = 0;
  double cap_ = 0, scale_ = 0;
};

class Search {
 public:
  Search(const Problem& problem, uint64_t seed, int64_t budget, double seconds)
      : p_(problem), open_(problem.num_degrees), random_(seed), budget_(budget), deadline_(now() + seconds) {}

  Plan run();
  double homogeneous(Plan* best, double* fixed);
  int assign(const Plan& plan, int* wave, int* group, int* degree);
  int64_t work() const { return work_; }
  bool late() const { return late_; }

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  bool spent(double share) {       // of the work; time running out counts as all of it
    if (work_ >= next_look_) {
      next_look_ = work_ + 20000;
      late_ = late_ || now() >= deadline_;
    }
    return late_ || double(work_) >= share * double(budget_);
  }
  double total(const std::vector<Wave>& waves) const {
    double ms = 0;
    for (const Wave& wave : waves) ms += wave.ms + p_.beta;
    return ms;
  }
  double lower(const Members& members) const {
    double area = 0, longest = 0;
    for (int k : members) area += p_.area[k], longest = std::max(longest, p_.floor[k]);
    return std::max(area / p_.num_slots, longest);
  }
  double pack(const Members& members, double cap, Style style, Members* kept = nullptr, Members* rest = nullptr,
              double skip = 0);
  int place(int k, double cap, Style style);
  bool solve(Wave& wave, double limit, int num_styles, double tolerance);
  bool single(Wave& wave, int degree, double limit);
  bool build(Plan& plan, double target, double preference, double stretch);
  std::vector<Members> chunks(int num) const;
  bool chunked(Plan& plan, int num);
  void improve(Plan& best, double from, double to);
  void exchange(Plan& plan, double temperature);
  void refill(Plan& plan, double temperature);
  void offer(std::vector<Plan>& starts, Plan plan);
  int pick_other(int count, int first) { return (first + 1 + random_.below(count - 1)) % count; }

  const Problem& p_;
  std::vector<Open> open_;
  std::vector<Group> groups_;
  std::vector<int> placed_;        // group of each member of the last pack
  int used_ = 0;
  Random random_;
  int64_t work_ = 0, budget_, next_look_ = 0;
  double deadline_;
  bool late_ = false;
};

// The group that takes sequence k, opened if need be; -1 if none does.
int Search::place(int k, double cap, Style style) {
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
    int g = open_[i].take(p_.time(k, i), p_.length[k], p_.capacity[i], groups_);
    if (g >= 0) return g;
  }
  while (!room && --preferred >= first)
    room = used_ + p_.degree[preferred] <= p_.num_slots && p_.time(k, preferred) <= cap;
  if (!room) return -1;
  used_ += p_.degree[preferred];
  groups_.push_back({preferred, 0, 0});
  return int(groups_.size()) - 1;
}

// Duration of `members` packed under `cap`, or -1 if they do not fit. With `kept`, what does not fit goes to `rest`
// instead, as does each sequence with probability `skip`.
double Search::pack(const Members& members, double cap, Style style, Members* kept, Members* rest, double skip) {
  work_ += 16;
  groups_.clear();
  placed_.clear();
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
    work_++;
    if (skip > 0 && q && random_.chance(skip)) { rest->push_back(k); continue; }
    size_t before = groups_.size();
    int g = place(k, within, style);
    if (g < 0) {
      if (!kept) return -1;
      rest->push_back(k);
      continue;
    }
    num_open += groups_.size() > before;
    Group& group = groups_[g];
    group.ms += p_.time(k, group.degree);
    group.tokens += p_.length[k];
    longest = std::max(longest, group.ms);
    placed_.push_back(g);
    if (kept) kept->push_back(k);
    if (group.tokens + shortest <= p_.capacity[group.degree]) open_[group.degree].insert(g, groups_);
    else num_open--;
  }
  return longest;
}

// Packs the wave's members as short as bisection finds; false at once if `limit` is out of reach.
bool Search::solve(Wave& wave, double limit, int num_styles, double tolerance) {
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
bool Search::single(Wave& wave, int degree, double limit) {
  double area = 0, low = 0, most = 0;
  for (int k : wave.members) {
    if (p_.least[k] > degree) return false;
    double ms = p_.time(k, degree);
    area += ms, low = std::max(low, ms), most += ms;
  }
  int width = p_.num_slots / p_.degree[degree];
  low = std::max(low, area / width);
  if (low >= limit) return false;
  Style style{1, degree};
  double cap = std::min(limit, most * (1 + 1e-9)), ms = pack(wave.members, cap, style);
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

// Waves of about `target` ms, longest sequences first; the last one takes what is left as short as it can.
bool Search::build(Plan& plan, double target, double preference, double stretch) {
  Members pool(p_.num_sequences);
  for (int k = 0; k < p_.num_sequences; k++) pool[k] = k;
  plan.waves.clear();
  while (!pool.empty()) {
    double cap = NEVER;
    for (int i = p_.least[pool[0]]; i < p_.num_degrees && cap > target; i++) {
      double ms = p_.time(pool[0], i);
      cap = ms <= target ? target : std::min(cap, ms * stretch);
    }
    Wave wave;
    wave.members = pool;
    if (solve(wave, cap * 1.3, 1, 2e-3)) {
      plan.waves.push_back(std::move(wave));
      break;
    }
    Members rest;
    wave.members.clear();
    wave.cap = cap, wave.style = {preference, -1};
    wave.ms = pack(pool, cap, wave.style, &wave.members, &rest);
    if (wave.members.empty() || plan.waves.size() >= MOST_WAVES) return false;
    plan.waves.push_back(std::move(wave));
    pool.swap(rest);
  }
  plan.ms = total(plan.waves);
  return true;
}

// Contiguous chunks of the sequences with about equal tokens, at most `num`.
std::vector<Members> Search::chunks(int num) const {
  double tokens = 0;
  for (int k = 0; k < p_.num_sequences; k++) tokens += p_.length[k];
  auto cut = [&](double most, std::vector<Members>* found) {
    int count = 0;
    double sum = most;
    for (int k = 0; k < p_.num_sequences; k++) {
      if (count == 0 || sum + p_.length[k] > most) {
        count++, sum = 0;
        if (found) found->emplace_back();
      }
      if (found) found->back().push_back(k);
      sum += p_.length[k];
    }
    return count;
  };
  double low = std::max(p_.length[0], tokens / num), high = std::max(tokens, low);
  for (int step = 0; step < 40 && high - low > .5; step++) {
    double most = (low + high) / 2;
    if (cut(most, nullptr) <= num) high = most;
    else low = most;
  }
  std::vector<Members> found;
  cut(high, &found);
  return found;
}

bool Search::chunked(Plan& plan, int num) {
  plan.waves.clear();
  for (Members& members : chunks(num)) {
    Wave wave;
    wave.members = std::move(members);
    if (!solve(wave, NEVER, 1, 4e-4)) return false;
    plan.waves.push_back(std::move(wave));
  }
  plan.ms = total(plan.waves);
  return true;
}

// The best plans of one degree for all waves (its ms in `fixed`) and of one degree a wave (returned, and in `best`).
double Search::homogeneous(Plan* best, double* fixed) {
  double tokens = 0;
  for (int k = 0; k < p_.num_sequences; k++) tokens += p_.length[k];
  int least = std::max(1, int(std::ceil(tokens / p_.capacity[0] * p_.degree[0] / p_.num_slots)));
  *fixed = NEVER;
  for (int num = least, tried = 0; tried < 3 && num <= 2 * p_.num_sequences; num += std::max(1, (num - least) / 4)) {
    std::vector<double> sums(p_.num_degrees, 0);
    Plan plan;
    plan.ms = 0;
    for (Members& members : chunks(num)) {
      Wave wave;
      for (int i = 0; i < p_.num_degrees; i++) {
        Wave other;
        other.members = members;
        // Only degrees that hold the longest sequence can be the one degree of all waves.
        bool all = i >= p_.least[0] && sums[i] < *fixed;
        double limit = all || wave.members.empty() ? NEVER : wave.ms;
        if (!single(other, i, limit)) { sums[i] = NEVER; continue; }
        sums[i] += other.ms + p_.beta;
        if (wave.members.empty() || other.ms < wave.ms) wave = std::move(other);
      }
      if (wave.members.empty()) { plan.ms = NEVER; break; }
      plan.ms += wave.ms + p_.beta;
      plan.waves.push_back(std::move(wave));
    }
    if (plan.ms < best->ms) *best = plan;
    bool all = false;
    for (int i = p_.least[0]; i < p_.num_degrees; i++)
      if (plan.ms < NEVER && sums[i] < NEVER) *fixed = std::min(*fixed, sums[i]), all = true;
    tried += all || (tried > 0);
  }
  return best->ms;
}

// Keeps the best plan of each number of waves, and of those the best few.
void Search::offer(std::vector<Plan>& starts, Plan plan) {
  auto same = std::find_if(starts.begin(), starts.end(),
                           [&](const Plan& other) { return other.waves.size() == plan.waves.size(); });
  if (same == starts.end()) starts.push_back(std::move(plan));
  else if (plan.ms < same->ms) *same = std::move(plan);
  std::stable_sort(starts.begin(), starts.end(), [](const Plan& a, const Plan& b) { return a.ms < b.ms; });
  if (starts.size() > STARTS) starts.pop_back();
}

// Moves one to three sequences of a wave against none to two of another.
void Search::exchange(Plan& plan, double temperature) {
  int num = int(plan.waves.size()), ia = random_.below(num), ib = pick_other(num, ia);
  Wave &a = plan.waves[ia], &b = plan.waves[ib];
  if (a.members.size() < 2) return;
  int num_out = 1 + int(random_.uniform() * random_.uniform() * 3), num_in = random_.below(3);
  Members out, in;
  bool similar = random_.chance(.6);
  auto add = [](Members& to, int k) {
    if (std::find(to.begin(), to.end(), k) == to.end()) to.push_back(k);
  };
  for (int q = 0; q < num_out; q++) add(out, a.members[random_.below(int(a.members.size()))]);
  int near = int(std::lower_bound(b.members.begin(), b.members.end(), out[0]) - b.members.begin()) - 4;
  for (int q = 0; q < num_in; q++) {
    int at = similar ? near + random_.below(9) + q : random_.below(int(b.members.size()));
    if (at >= 0 && at < int(b.members.size())) add(in, b.members[at]);
  }
  auto swapped = [](const Members& from, Members& less, Members& more) {
    std::sort(less.begin(), less.end());
    std::sort(more.begin(), more.end());
    Members kept, merged;
    std::set_difference(from.begin(), from.end(), less.begin(), less.end(), std::back_inserter(kept));
    std::merge(kept.begin(), kept.end(), more.begin(), more.end(), std::back_inserter(merged));
    return merged;
  };
  Wave na, nb;
  na.members = swapped(a.members, out, in);
  nb.members = swapped(b.members, in, out);
  work_ += int64_t(na.members.size() + nb.members.size()) / 4;
  if (na.members.empty() || nb.members.empty()) return;
  double limit = a.ms + b.ms + temperature * random_.uniform();
  double low_a = lower(na.members), low_b = lower(nb.members);
  if (low_a + low_b >= limit) return;
  bool b_first = random_.chance(.5);
  Wave &first = b_first ? nb : na, &second = b_first ? na : nb;
  if (!solve(first, limit - (b_first ? low_a : low_b), 2, 4e-4)) return;
  if (!solve(second, limit - first.ms, 2, 4e-4)) return;
  a = std::move(na), b = std::move(nb);
}

// Pools two or three waves, fills new ones under random caps, and solves the last; may end with a wave more or less.
void Search::refill(Plan& plan, double temperature) {
  int num = int(plan.waves.size()), count = std::min(num, random_.chance(.7) ? 2 : 3);
  std::vector<int> chosen;
  while (int(chosen.size()) < count) {
    int x = random_.below(num);
    if (std::find(chosen.begin(), chosen.end(), x) == chosen.end()) chosen.push_back(x);
  }
  Members pool;
  double old = 0;
  for (int x : chosen) {
    pool.insert(pool.end(), plan.waves[x].members.begin(), plan.waves[x].members.end());
    old += plan.waves[x].ms + p_.beta;
  }
  std::sort(pool.begin(), pool.end());
  double limit = old + temperature * random_.uniform(), spent_ms = 0;
  double skip = random_.chance(.4) ? 0 : random_.chance(.5) ? .02 : random_.chance(.5) ? .1 : .4;
  std::vector<Wave> filled;
  for (int x = 0; x <= count && !pool.empty(); x++) {
    double room = limit - spent_ms - p_.beta;
    if (room <= 0) return;
    Wave wave;
    if (x >= count - 1 || random_.chance(.08)) {
      wave.members = pool;
      if (solve(wave, room, random_.chance(.5) ? 2 : 4, 4e-4)) {
        spent_ms += wave.ms + p_.beta;
        filled.push_back(std::move(wave));
        pool.clear();
        break;
      }
      if (x >= count - 1) return;
      wave.members.clear();
    }
    int widths = p_.num_degrees - p_.least[pool[0]];
    double cap = random_.chance(.3)
        ? p_.time(pool[0], p_.least[pool[0]] + random_.below(widths)) * (random_.chance(.5) ? 1 : 1 + .1 * random_.uniform())
        : plan.waves[chosen[random_.below(count)]].ms * (random_.chance(.3) ? 1 : .85 + .3 * random_.uniform());
    cap = std::max(cap, p_.floor[pool[0]]);
    if (cap >= room) return;
    Members rest;
    wave.cap = cap, wave.style = {PREFERENCES[random_.below(4)], -1};
    wave.ms = pack(pool, cap, wave.style, &wave.members, &rest, skip);
    if (wave.members.empty()) return;
    if (random_.chance(.3)) solve(wave, wave.ms, 2, 4e-4);
    spent_ms += wave.ms + p_.beta;
    filled.push_back(std::move(wave));
    pool.swap(rest);
  }
  if (!pool.empty() || spent_ms >= limit) return;
  std::sort(chosen.rbegin(), chosen.rend());
  for (int x : chosen) plan.waves.erase(plan.waves.begin() + x);
  for (Wave& wave : filled) plan.waves.push_back(std::move(wave));
}

// Anneals from `best` between two shares of the work.
void Search::improve(Plan& best, double from, double to) {
  Plan plan = best;
  double first = 5e-3 * best.ms / double(best.waves.size());
  while (!spent(to)) {
    work_ += 16;
    double done = (double(work_) / double(budget_) - from) / (to - from);
    double temperature = first * std::max(0.0, 1 - done);
    if (plan.waves.size() > 1 && random_.chance(.5)) exchange(plan, temperature);
    else refill(plan, temperature);
    plan.ms = total(plan.waves);
    if (plan.ms < best.ms - 1e-9) best = plan;
  }
}

Plan Search::run() {
  double tokens = 0, area = 0;
  for (int k = 0; k < p_.num_sequences; k++) tokens += p_.length[k], area += p_.area[k];
  int least = std::max(1, int(std::ceil(tokens / p_.capacity[0] * p_.degree[0] / p_.num_slots)));
  double base = area / p_.num_slots / least;
  std::vector<Plan> starts;
  constexpr int GRID = 48;
  for (int x = 0; x < 10 * GRID; x++) {
    if (!starts.empty() && spent(x < 3 ? 1.0 : .5)) break;
    bool random = x >= GRID;
    double target = base * (.5 + 2.5 * (random ? random_.uniform() : double(x * 19 % GRID) / GRID));
    Plan plan;
    if (build(plan, target, PREFERENCES[random ? random_.below(4) : x & 1],
              random ? 1 + .15 * random_.uniform() : x & 2 ? 1.0001 : 1.06)) offer(starts, std::move(plan));
  }
  for (int num = least, found = 0; num < least + 12 && found < 3 && !spent(.55); num++) {
    Plan plan;
    if (chunked(plan, num)) offer(starts, std::move(plan)), found++;
  }
  if (starts.empty()) return {};
  double done = double(work_) / double(budget_), share = done < 1 && starts.size() > 1 ? .4 * (1 - done) : 0;
  bool several = double(budget_) > 5e5 * (1 + p_.num_sequences / 512);
  if (several)
    for (size_t x = 0; x < starts.size(); x++)
      improve(starts[x], done + share * x / starts.size(), done + share * (x + 1) / starts.size());
  Plan best = *std::min_element(starts.begin(), starts.end(), [](const Plan& a, const Plan& b) { return a.ms < b.ms; });
  if (done < 1) improve(best, several ? done + share : done, 1);
  for (Wave& wave : best.waves) {
    Wave polished;
    polished.members = wave.members;
    if (!late_ && solve(polished, wave.ms * (1 - 1e-6), 4, 1e-4)) wave = std::move(polished);
  }
  best.ms = total(best.waves);
  return best;
}

// Wave, group and degree of every sequence; -1 if a wave cannot be packed again, which would be a mistake in here.
int Search::assign(const Plan& plan, int* wave, int* group, int* degree) {
  for (size_t w = 0; w < plan.waves.size(); w++) {
    const Members& members = plan.waves[w].members;
    if (pack(members, plan.waves[w].cap, plan.waves[w].style) < 0) return -1;
    for (size_t q = 0; q < members.size(); q++) {
      wave[members[q]] = int(w);
      group[members[q]] = placed_[q];
      degree[members[q]] = groups_[placed_[q]].degree;
    }
  }
  return 0;
}

}  // namespace

// Plans `num_sequences` sequences of descending length. `report` receives the ms of the plan, of the best plan of one
// degree, of the best plan of one degree a wave, the work done, and whether the clock ended the search. 0, or -1 if no
// plan was found.
extern "C" int distrain_plan_waves(int num_slots, int num_degrees, const int* degrees, const double* capacity,
                                   double beta, int num_sequences, const double* lengths, const double* times,
                                   int64_t budget, double seconds, uint64_t seed, int* wave, int* group, int* degree,
                                   double* report) {
  Problem problem{num_slots, num_degrees, num_sequences, degrees, capacity, beta, lengths, times, {}, {}, {}};
  for (int k = 0; k < num_sequences; k++) {
    int least = 0;
    while (least < num_degrees && lengths[k] > capacity[least]) least++;
    if (least == num_degrees) return -1;
    double area = NEVER, floor = NEVER;
    for (int i = least; i < num_degrees; i++) {
      area = std::min(area, problem.time(k, i) * degrees[i]);
      floor = std::min(floor, problem.time(k, i));
    }
    problem.least.push_back(least);
    problem.area.push_back(area);
    problem.floor.push_back(floor);
  }
  Plan floor;
  double fixed;
  Search baseline(problem, seed, 1, NEVER);
  double adaptive = baseline.homogeneous(&floor, &fixed);
  Search search(problem, seed, std::max<int64_t>(1, budget - baseline.work()), seconds);
  Plan plan = search.run();
  if (floor.ms < plan.ms) plan = std::move(floor);
  report[0] = plan.ms, report[1] = fixed, report[2] = adaptive;
  report[3] = double(search.work() + baseline.work()), report[4] = search.late();
  return plan.waves.empty() ? -1 : search.assign(plan, wave, group, degree);
}
