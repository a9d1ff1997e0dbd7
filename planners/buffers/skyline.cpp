// Do these buffers fit under a capacity? A complete search with restarts; see skyline.py for the idea and the words.
//
// Names: a *section* is a column of time, its *floor* the height below which nothing more will be put, its *demand* the
// sizes still to be placed in it. A buffer *rests* on the highest floor of its sections.

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using i32 = std::int32_t;
using i64 = std::int64_t;
using u64 = std::uint64_t;
constexpr i64 FAR = std::numeric_limits<i64>::max();

u64 mix(u64 x) {  // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

struct Random {
    u64 state;
    u64 next() { return mix(state++); }
    u64 below(u64 n) { return next() % n; }
    double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }
};

using Key = std::array<u64, 2>;

// States known to have no solution. 128 bits, so that a proof does not hang on a collision.
class Failures {
   public:
    Failures() : slots_(1 << 12) {}

    bool contains(const Key& key) const { return slots_[find(key)] == key; }

    void insert(const Key& key) {
        if (2 * count_ >= slots_.size()) {
            if (slots_.size() >= MOST) return;  // full: the search stays complete, only slower
            std::vector<Key> old(2 * slots_.size());
            old.swap(slots_);
            for (const Key& each : old)
                if (each != Key{}) slots_[find(each)] = each;
        }
        Key& slot = slots_[find(key)];
        if (slot != key) {
            slot = key;
            ++count_;
        }
    }

   private:
    static constexpr std::size_t MOST = std::size_t{1} << 22;

    std::size_t find(const Key& key) const {
        std::size_t at = key[0] & (slots_.size() - 1);
        while (slots_[at] != Key{} && slots_[at] != key) at = (at + 1) & (slots_.size() - 1);
        return at;
    }

    std::vector<Key> slots_;
    std::size_t count_ = 0;
};

enum class Answer : i32 { no = 0, yes = 1, unknown = -1 };

// Which section to branch on: the fewest candidates, the lowest floor, the least slack, or the fewest with noise.
enum class Rule : u64 { fewest, lowest, tightest, noisy };

class Search {
   public:
    Search(i32 n, i32 sections, const i32* lower, const i32* upper, const i64* size, i64 capacity, u64 seed)
        : n_(n), lower_(lower), upper_(upper), size_(size), capacity_(capacity), floor_(sections), demand_(sections),
          lowest_rest_(sections), candidates_(sections), rest_(n), placed_(n), rank_(n), offset_(n), random_{mix(seed)} {}

    Answer run(i64 max_nodes, double max_seconds, const volatile i32* stop) {
        max_nodes_ = max_nodes;
        stop_ = stop;
        deadline_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                       std::chrono::duration<double>(std::min(max_seconds, 1e8)));
        std::vector<i32> all(n_);
        for (i32 i = 0; i < n_; ++i) all[i] = i;
        for (restarts = 0;; ++restarts) {
            begin_round();
            const Answer answer = solve(0, static_cast<i32>(floor_.size()), all);
            if (answer != Answer::unknown || out_of_time_) return answer;
        }
    }

    const std::vector<i64>& offsets() const { return offset_; }
    i64 nodes = 0;
    i64 restarts = 0;

   private:
    using Clock = std::chrono::steady_clock;

    // 1 1 2 1 1 2 4 1 1 2 ...: within a logarithm of the best restarting policy there is.
    static i64 luby(i64 i) {
        for (i64 power = 1;; power *= 2) {
            if (i == 2 * power - 2) return power;
            if (i < 2 * power - 2) return luby(i - power + 1);
        }
    }

    void begin_round() {
        node_limit_ = std::min(max_nodes_, nodes + BASE * luby(restarts));
        std::fill(floor_.begin(), floor_.end(), 0);
        std::fill(demand_.begin(), demand_.end(), 0);
        std::fill(placed_.begin(), placed_.end(), 0);
        const u64 order = random_.below(8);
        rule_ = static_cast<Rule>(random_.below(4));
        for (i32 i = 0; i < n_; ++i) {
            for (i32 t = lower_[i]; t < upper_[i]; ++t) demand_[t] += size_[i];
            const double length = upper_[i] - lower_[i], size = static_cast<double>(size_[i]), noise = random_.unit();
            switch (order) {
                case 0: rank_[i] = length * size * (0.8 + 0.4 * noise); break;
                case 1: rank_[i] = length * size * (0.5 + noise); break;
                case 2: rank_[i] = size * (0.9 + 0.2 * noise); break;
                case 3: rank_[i] = size * (0.5 + noise); break;
                case 4: rank_[i] = length + noise; break;
                case 5: rank_[i] = length + 2.5 * noise; break;
                case 6: rank_[i] = length + size / static_cast<double>(capacity_); break;
                default: rank_[i] = -size * (0.5 + noise); break;
            }
        }
    }

    // Raise floors to where something can still rest, until nothing changes; false if some section overflows.
    bool tighten(i32 begin, i32 end, const std::vector<i32>& open) {
        for (bool changed = true; changed;) {
            changed = false;
            for (i32 t = begin; t < end; ++t) lowest_rest_[t] = FAR;
            for (const i32 i : open) {
                const i64 rest = *std::max_element(&floor_[lower_[i]], &floor_[upper_[i] - 1] + 1);
                if (rest + size_[i] > capacity_) return false;
                rest_[i] = rest;
                for (i32 t = lower_[i]; t < upper_[i]; ++t) lowest_rest_[t] = std::min(lowest_rest_[t], rest);
            }
            for (i32 t = begin; t < end; ++t) {
                if (demand_[t] == 0) continue;
                changed |= lowest_rest_[t] > floor_[t];
                floor_[t] = lowest_rest_[t];
                if (floor_[t] + demand_[t] > capacity_) return false;
            }
        }
        return true;
    }

    Key key(i32 begin, i32 end, const std::vector<i32>& open) const {
        Key found{1, 2};
        for (i32 t = begin; t < end; ++t) {
            if (demand_[t] == 0) continue;
            const u64 cell = mix(static_cast<u64>(floor_[t]) * 0x100000001b3u + static_cast<u64>(t));
            found[0] += cell;
            found[1] ^= mix(cell);
        }
        for (const i32 i : open) {
            found[0] += mix(~static_cast<u64>(i));
            found[1] ^= mix(mix(~static_cast<u64>(i)));
        }
        return found;
    }

    void place(i32 i, i64 at) {
        placed_[i] = 1;
        offset_[i] = at;
        for (i32 t = lower_[i]; t < upper_[i]; ++t) {
            floor_[t] = at + size_[i];
            demand_[t] -= size_[i];
        }
    }

    void lift(i32 i) {
        placed_[i] = 0;
        for (i32 t = lower_[i]; t < upper_[i]; ++t) demand_[t] += size_[i];
    }

    bool exhausted() {
        if (++nodes > node_limit_) {
            out_of_time_ |= nodes > max_nodes_;
            return true;
        }
        if (nodes % 128 == 0) out_of_time_ |= *stop_ != 0 || Clock::now() > deadline_;
        return out_of_time_;
    }

    // Place all of `open`, which live in [begin, end). Floors of that range are as before unless the answer is yes.
    Answer solve(i32 begin, i32 end, const std::vector<i32>& open) {
        if (open.empty()) return Answer::yes;
        if (exhausted()) return Answer::unknown;
        const std::vector<i64> before(&floor_[begin], &floor_[end - 1] + 1);
        Answer answer = Answer::no;
        if (tighten(begin, end, open)) {
            const Key state = key(begin, end, open);
            if (!failures_.contains(state)) {
                const auto parts = split(open);
                answer = parts.size() > 1 ? solve_apart(parts) : branch(begin, end, open);
                if (answer == Answer::no) failures_.insert(state);
            }
        }
        if (answer != Answer::yes) std::copy(before.begin(), before.end(), &floor_[begin]);
        return answer;
    }

    // Groups of `open` that no longer touch each other in time, the smallest first: it fails soonest.
    std::vector<std::vector<i32>> split(const std::vector<i32>& open) {
        std::vector<i32> sorted(open);
        std::sort(sorted.begin(), sorted.end(), [&](i32 a, i32 b) { return lower_[a] < lower_[b]; });
        std::vector<std::vector<i32>> parts;
        i32 reach = -1;
        for (const i32 i : sorted) {
            if (lower_[i] >= reach) parts.emplace_back();
            parts.back().push_back(i);
            reach = std::max(reach, upper_[i]);
        }
        std::stable_sort(parts.begin(), parts.end(), [](const auto& a, const auto& b) { return a.size() < b.size(); });
        return parts;
    }

    Answer solve_apart(const std::vector<std::vector<i32>>& parts) {
        for (std::size_t k = 0; k < parts.size(); ++k) {
            i32 begin = lower_[parts[k][0]], end = upper_[parts[k][0]];
            for (const i32 i : parts[k]) begin = std::min(begin, lower_[i]), end = std::max(end, upper_[i]);
            const Answer answer = solve(begin, end, parts[k]);
            if (answer == Answer::yes) continue;
            for (std::size_t done = 0; done < k; ++done)
                for (const i32 i : parts[done]) lift(i);
            return answer;
        }
        return Answer::yes;
    }

    // The section to branch on, whose candidates stay in candidates_. Only local minima: every buffer that rests there
    // lies flat, so that putting it down loses no room below it.
    i32 pick(i32 begin, i32 end, const std::vector<i32>& open) {
        constexpr i32 UNEVEN = -1;
        for (i32 t = begin; t < end; ++t) candidates_[t].clear();
        for (const i32 i : open) {
            const bool flat = std::all_of(&floor_[lower_[i]], &floor_[upper_[i] - 1] + 1,
                                          [&](i64 floor) { return floor == rest_[i]; });
            for (i32 t = lower_[i]; t < upper_[i]; ++t)
                if (floor_[t] == rest_[i]) candidates_[t].push_back(flat ? i : UNEVEN);
        }
        i32 best = -1;
        double best_score = std::numeric_limits<double>::infinity();
        for (i32 t = begin; t < end; ++t) {
            const auto& here = candidates_[t];
            if (here.empty() || std::find(here.begin(), here.end(), UNEVEN) != here.end()) continue;
            const double score = judge(t, static_cast<double>(here.size()));
            if (score < best_score) best = t, best_score = score;
        }
        return best;
    }

    double judge(i32 t, double count) {
        const double slack = static_cast<double>(capacity_ - floor_[t] - demand_[t]);
        const double share = slack / static_cast<double>(capacity_);
        switch (rule_) {
            case Rule::fewest: return count + (slack > 0 ? 1.5 : 0) + 1e-3 * share;
            case Rule::lowest: return static_cast<double>(floor_[t]) / static_cast<double>(capacity_) * 1e6 + count;
            case Rule::tightest: return share * 1e3 + count;
            default: return count + (slack > 0 ? 1.5 : 0) + random_.unit();
        }
    }

    // Who lies lowest in one section: each buffer that rests there in turn, or nobody if there is slack to give away.
    Answer branch(i32 begin, i32 end, const std::vector<i32>& open) {
        const i32 t = pick(begin, end, open);
        std::vector<i32> here = candidates_[t];
        std::sort(here.begin(), here.end(), [&](i32 a, i32 b) { return rank_[a] > rank_[b]; });
        const i64 floor = floor_[t], raised = next_rest(t, here, open);
        const std::vector<i64> tight(&floor_[begin], &floor_[end - 1] + 1);
        std::vector<std::tuple<i32, i32, i64>> tried;
        std::vector<i32> others;
        for (const i32 i : here) {
            const std::tuple<i32, i32, i64> twin{lower_[i], upper_[i], size_[i]};
            if (std::find(tried.begin(), tried.end(), twin) != tried.end()) continue;
            tried.push_back(twin);
            others.clear();
            for (const i32 j : open)
                if (j != i) others.push_back(j);
            place(i, floor);
            const Answer answer = solve(begin, end, others);
            if (answer == Answer::yes) return answer;
            lift(i);
            std::copy(tight.begin(), tight.end(), &floor_[begin]);
            if (answer == Answer::unknown) return answer;
        }
        if (raised == FAR || raised + demand_[t] > capacity_) return Answer::no;
        floor_[t] = raised;
        return solve(begin, end, open);
    }

    // The lowest place above its floor where a buffer of section t can come to lie: where one rests higher already, or on
    // top of a buffer that was put below it.
    i64 next_rest(i32 t, const std::vector<i32>& here, const std::vector<i32>& open) const {
        i32 begin = t, end = t + 1;
        for (const i32 i : here) begin = std::min(begin, lower_[i]), end = std::max(end, upper_[i]);
        i64 raised = FAR;
        for (const i32 j : open) {
            if (lower_[j] <= t && t < upper_[j] && rest_[j] > floor_[t]) raised = std::min(raised, rest_[j]);
            if (lower_[j] >= end || upper_[j] <= begin) continue;
            for (const i32 i : here) {
                if (i == j || lower_[i] >= upper_[j] || lower_[j] >= upper_[i]) continue;
                raised = std::min(raised, rest_[j] + size_[j]);
                break;
            }
        }
        return raised;
    }

    static constexpr i64 BASE = 100;

    const i32 n_;
    const i32* const lower_;
    const i32* const upper_;
    const i64* const size_;
    const i64 capacity_;
    std::vector<i64> floor_, demand_, lowest_rest_;
    std::vector<std::vector<i32>> candidates_;
    std::vector<i64> rest_;
    std::vector<char> placed_;
    std::vector<double> rank_;
    std::vector<i64> offset_;
    Failures failures_;
    Random random_;
    Rule rule_ = Rule::fewest;
    i64 node_limit_ = 0, max_nodes_ = 0;
    const volatile i32* stop_ = nullptr;
    Clock::time_point deadline_;
    bool out_of_time_ = false;
};

}  // namespace

// 1: fits, with offsets; 0: proven not to fit; -1: not known within the limits. counts: nodes, restarts.
extern "C" i32 skyline_fit(i32 n, i32 sections, const i32* lower, const i32* upper, const i64* size, i64 capacity,
                           u64 seed, i64 max_nodes, double max_seconds, const volatile i32* stop, i64* offsets,
                           i64* counts) {
    Search search(n, sections, lower, upper, size, capacity, seed);
    const Answer answer = search.run(max_nodes, max_seconds, stop);
    std::copy(search.offsets().begin(), search.offsets().end(), offsets);
    counts[0] = search.nodes;
    counts[1] = search.restarts;
    return static_cast<i32>(answer);
}
