// Lock-step plans by waves: which sequences share a micro-batch, and in groups of which degrees.
//
//   build    waves of a target duration, longest sequences first; many targets are tried
//   chunked  token-balanced contiguous waves, as FlexSP cuts them
//   improve  annealing: sequences are exchanged between two waves, or waves are pooled, filled anew and solved
//
// A few sequences are planned exactly (exact.hpp). Otherwise the search ends after a given amount of work, counted in
// placements: the same plan on every machine. The clock is only a guard, and counts the thread's own time, so that other
// work on the machine changes no plan. Nothing here is global; a call owns all of its state.

#include "exact.hpp"
#include "homogeneous.hpp"
#include "pack.hpp"

#include <atomic>
#include <cmath>
#include <ctime>
#include <iterator>

namespace distrain {
namespace {

constexpr size_t STARTS = 4;       // plans that are improved side by side
constexpr size_t MOST_WAVES = 100000;
constexpr int LOOK_WORK = 20000;   // placements between two looks at the clock
constexpr double GRACE_S = 1;      // that other work on the machine may delay a search before the clock ends it
constexpr double FINE = 4e-4, COARSE = 1e-3, POLISH = 1e-4;  // tolerances of bisections

// Seconds since some moment: of the day, or of this thread's work.
double now(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

class Search {
 public:
  Search(const Problem& problem, Packer& packer, uint64_t seed, int64_t budget, double seconds,
         const std::atomic<int>& stop)
      : p_(problem), packer_(packer), random_(seed), budget_(std::max<int64_t>(1, budget - packer.work)), stop_(stop),
        done_(packer.work), worked_until_(now(CLOCK_THREAD_CPUTIME_ID) + seconds),
        deadline_(now(CLOCK_MONOTONIC) + seconds + GRACE_S) {}

  Plan run();
  int assign(const Plan& plan, int* wave, int* group, int* degree);
  bool late() const { return late_; }

 private:
  int64_t work() const { return packer_.work - done_; }
  bool spent(double share) {       // of the work; time running out counts as all of it
    if (late_ || double(work()) >= share * double(budget_)) return true;
    if (work() >= next_look_) {
      next_look_ = work() + LOOK_WORK;
      late_ = stop_ || now(CLOCK_THREAD_CPUTIME_ID) >= worked_until_ || now(CLOCK_MONOTONIC) >= deadline_;
    }
    return late_;
  }
  double total(const std::vector<Wave>& waves) const {
    double ms = 0;
    for (const Wave& wave : waves) ms += wave.ms + p_.beta;
    return ms;
  }
  bool build(Plan& plan, double target, double preference, double stretch);
  bool chunked(Plan& plan, int num);
  void improve(Plan& best, double from, double to);
  void exchange(Plan& plan, double temperature);
  void refill(Plan& plan, double temperature);
  void offer(std::vector<Plan>& starts, Plan plan);
  int pick_other(int count, int first) { return (first + 1 + random_.below(count - 1)) % count; }

  const Problem& p_;
  Packer& packer_;
  Random random_;
  const int64_t budget_;
  const std::atomic<int>& stop_;
  const int64_t done_;             // work before this search
  int64_t next_look_ = 0;
  const double worked_until_, deadline_;
  bool late_ = false;
};

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
    if (packer_.solve(wave, cap * 1.3, 1, 2e-3)) {
      plan.waves.push_back(std::move(wave));
      break;
    }
    Members rest;
    wave.members.clear();
    wave.cap = cap, wave.style = {preference, -1};
    wave.ms = packer_.pack(pool, cap, wave.style, &wave.members, &rest);
    if (wave.members.empty() || plan.waves.size() >= MOST_WAVES) return false;
    plan.waves.push_back(std::move(wave));
    pool.swap(rest);
  }
  plan.ms = total(plan.waves);
  return true;
}

bool Search::chunked(Plan& plan, int num) {
  plan.waves.clear();
  for (Members& members : chunks(p_, num)) {
    Wave wave;
    wave.members = std::move(members);
    if (!packer_.solve(wave, NEVER, 1, FINE)) return false;
    plan.waves.push_back(std::move(wave));
  }
  plan.ms = total(plan.waves);
  return true;
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
  {
    int ja = random_.below(num), jb = pick_other(num, ja);
    if (plan.waves[ja].members.size() + plan.waves[jb].members.size() < plan.waves[ia].members.size() + plan.waves[ib].members.size()) ia = ja, ib = jb;
  }
  Wave &a = plan.waves[ia], &b = plan.waves[ib];
  if (a.members.size() < 2) return;
  int num_out = 1 + int(random_.uniform() * random_.uniform() * 3), num_in = random_.below(3);
  Members out, in;
  bool similar = random_.chance(.5);
  auto add = [](Members& to, int k) {
    if (std::find(to.begin(), to.end(), k) == to.end()) to.push_back(k);
  };
  int run = 1 + int(random_.uniform() * random_.uniform() * p_.num_slots / 16);  // large machines move many at once
  for (int q = 0; q < num_out; q++) {
    int at = int(a.members.size() * random_.uniform() * random_.uniform());
    for (int r = at; r < at + run && r < int(a.members.size()); r++) add(out, a.members[r]);
  }
  int near = int(std::lower_bound(b.members.begin(), b.members.end(), out[0]) - b.members.begin()) - 4;
  for (int q = 0; q < num_in; q++) {
    int at = similar ? near + random_.below(9) + q : int(b.members.size() * random_.uniform() * random_.uniform());
    for (int r = std::max(0, at); r < at + run && r < int(b.members.size()); r++) add(in, b.members[r]);
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
  packer_.work += int64_t(na.members.size() + nb.members.size()) / 4;
  if (na.members.empty() || nb.members.empty()) return;
  double limit = a.ms + b.ms + temperature * random_.uniform();
  double low_a = packer_.lower(na.members), low_b = packer_.lower(nb.members);
  if (low_a + low_b >= limit) return;
  bool b_first = random_.chance(.5);
  Wave &first = b_first ? nb : na, &second = b_first ? na : nb;
  if (!packer_.solve(first, limit - (b_first ? low_a : low_b), 2, COARSE)) return;
  if (!packer_.solve(second, limit - first.ms, 2, COARSE)) return;
  a = std::move(na), b = std::move(nb);
}

// Pools two or three waves, fills new ones under random caps, and solves the last; may end with a wave more or less.
void Search::refill(Plan& plan, double temperature) {
  int num = int(plan.waves.size()), count = std::min(num, random_.chance(.85) ? 2 : 3);
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
      if (packer_.solve(wave, room, random_.chance(.5) ? 2 : 4, COARSE)) {
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
    wave.ms = packer_.pack(pool, cap, wave.style, &wave.members, &rest, skip, &random_);
    if (wave.members.empty()) return;
    if (random_.chance(.3)) packer_.solve(wave, wave.ms, 2, COARSE);
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
    packer_.work += PACK_WORK;
    double done = (double(work()) / double(budget_) - from) / (to - from);
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
  int least = std::max(1, int(std::ceil(tokens / p_.memory())));
  double base = area / p_.num_slots / least;
  std::vector<Plan> starts;
  constexpr int GRID = 48;
  for (int x = 0; x < 10 * GRID; x++) {
    if (!starts.empty() && spent(x < 3 ? 1.0 : .25)) break;
    bool random = x >= GRID;
    double target = base * (.5 + 2.5 * (random ? random_.uniform() : double(x * 19 % GRID) / GRID));
    Plan plan;
    if (build(plan, target, PREFERENCES[random ? random_.below(4) : x & 1],
              random ? 1 + .15 * random_.uniform() : x & 2 ? 1.0001 : 1.06)) offer(starts, std::move(plan));
  }
  for (int num = least, found = 0; num < least + 12 && found < 3 && !spent(.3); num++) {
    Plan plan;
    if (chunked(plan, num)) offer(starts, std::move(plan)), found++;
  }
  if (starts.empty()) return {};
  double done = double(work()) / double(budget_), share = done < 1 && starts.size() > 1 ? .4 * (1 - done) : 0;
  bool several = double(budget_) > 5e5 * (1 + p_.num_sequences / 512);
  if (several)
    for (size_t x = 0; x < starts.size(); x++)
      improve(starts[x], done + share * x / starts.size(), done + share * (x + 1) / starts.size());
  Plan best = *std::min_element(starts.begin(), starts.end(), [](const Plan& a, const Plan& b) { return a.ms < b.ms; });
  if (done < 1) improve(best, several ? done + share : done, 1);
  for (Wave& wave : best.waves) {
    Wave polished;
    polished.members = wave.members;
    if (!late_ && double(work()) < 1.1 * double(budget_) && packer_.solve(polished, wave.ms * (1 - 1e-6), 4, POLISH)) wave = std::move(polished);
  }
  best.ms = total(best.waves);
  return best;
}

// Wave, group and degree of every sequence; -1 if a wave cannot be packed again, which would be a mistake in here.
int Search::assign(const Plan& plan, int* wave, int* group, int* degree) {
  for (size_t w = 0; w < plan.waves.size(); w++) {
    const Members& members = plan.waves[w].members;
    if (packer_.pack(members, plan.waves[w].cap, plan.waves[w].style) < 0) return -1;
    for (size_t q = 0; q < members.size(); q++) {
      wave[members[q]] = int(w);
      group[members[q]] = packer_.placed[q];
      degree[members[q]] = packer_.groups[packer_.placed[q]].degree;
    }
  }
  return 0;
}

}  // namespace
}  // namespace distrain

// Plans `num_sequences` sequences of descending length. `report` receives the ms of the best plan of one degree, and of
// the best of one degree a wave; whether the clock ended the search; and whether every plan was looked at. The search
// ends soon after `stop` is set. 0, or -1 if no plan was found.
extern "C" int distrain_plan_waves(int num_slots, int num_degrees, const int* degrees, const double* capacity,
                                   double beta, int num_sequences, const double* lengths, const double* times,
                                   int64_t budget, double seconds, uint64_t seed, const std::atomic<int>* stop,
                                   int* wave, int* group, int* degree, double* report) {
  using namespace distrain;
  Problem problem{num_slots, num_degrees, num_sequences, degrees, capacity, beta, lengths, times, {}, {}, {}};
  if (!problem.prepare()) return -1;
  Packer packer(problem);
  Homogeneous homogeneous(problem, packer, budget / 10);
  Plan fixed = homogeneous.fixed(), floor = homogeneous.adaptive(fixed);
  report[0] = fixed.ms, report[1] = floor.ms;
  if (num_sequences <= Exact::MOST && Exact::work(num_sequences) <= budget / 2) {
    report[3] = 1;
    return Exact(problem).solve(wave, group, degree) < NEVER ? 0 : -1;
  }
  Search search(problem, packer, seed, budget, seconds, *stop);
  Plan plan = search.run();
  if (floor.ms < plan.ms) plan = std::move(floor);
  report[2] = search.late();
  return plan.waves.empty() ? -1 : search.assign(plan, wave, group, degree);
}
