// Do these buffers fit under a capacity? A complete search with restarts; see skyline.py for the idea and the words.
//
// Names: a *section* is a column of time, its *floor* the height below which nothing more will be put, its *demand* the
// sizes still to be placed in it. A buffer *rests* at the lowest place that is not known to be impossible: on the
// highest floor of its sections, or higher.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "failures.hpp"

namespace {

constexpr i64 FAR = std::numeric_limits<i64>::max();

enum class Answer : i32 { no = 0, yes = 1, unknown = -1 };

// Which section to branch on: the fewest candidates, the lowest floor, the least slack, or the fewest with noise.
enum class Rule : u64 { fewest, lowest, tightest, noisy };

class Search {
   public:
    Search(i32 n, i32 sections, const i32* lower, const i32* upper, const i64* size, i64 capacity, u64 seed)
        : n_(n), sections_(sections), lower_(lower), upper_(upper), size_(size), capacity_(capacity),
          first_(sections + 1), floor_(sections), demand_(sections), rest_(n), offset_(n, OPEN), queued_(sections),
          count_(sections), name_(n), rank_(n), random_{mix(seed)} {
        for (i32 i = 0; i < n; ++i) {
            name_[i] = mix(~static_cast<u64>(i));
            for (i32 t = lower[i]; t < upper[i]; ++t) demand_[t] += size[i], ++first_[t + 1];
        }
        std::partial_sum(first_.begin(), first_.end(), first_.begin());
        living_.resize(first_[sections]);
        std::vector<i64> next(first_.begin(), first_.end() - 1);
        for (const i32 i : sorted([&](i32 a, i32 b) { return size[a] < size[b]; }))
            for (i32 t = lower[i]; t < upper[i]; ++t) living_[next[t]++] = i;
    }

    Answer run(i64 max_nodes, double max_seconds, const volatile i32* stop) {
        max_nodes_ = max_nodes;
        stop_ = stop;
        deadline_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                       std::chrono::duration<double>(std::min(max_seconds, 1e8)));
        // By birth, as every list of open buffers is.
        const auto all = sorted([&](i32 a, i32 b) { return std::tie(lower_[a], a) < std::tie(lower_[b], b); });
        for (i32 t = 0; t < sections_; ++t) touch(t);
        if (!settle(true)) return Answer::no;
        for (restarts = 0;; ++restarts) {
            begin_round();
            const std::size_t mark = trail_.size();
            const Answer answer = solve(0, sections_, all);
            if (answer != Answer::unknown || out_of_time_) return answer;
            undo(mark);
        }
    }

    const std::vector<i64>& offsets() const { return offset_; }
    i64 nodes = 0, restarts = 0;

   private:
    using Clock = std::chrono::steady_clock;

    template <class Less>
    std::vector<i32> sorted(Less less) const {
        std::vector<i32> all(n_);
        std::iota(all.begin(), all.end(), 0);
        std::sort(all.begin(), all.end(), less);
        return all;
    }

    void begin_round() {
        node_limit_ = std::min(max_nodes_, nodes + std::max<i64>(BASE, n_) * luby(restarts));
        const u64 order = random_.below(8);
        rule_ = static_cast<Rule>(random_.below(4));
        for (i32 i = 0; i < n_; ++i) {
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

    // All that a node changes goes through here, so that it can be taken back.
    void set(i64& cell, i64 value) {
        trail_.push_back({&cell, cell});
        cell = value;
    }

    void undo(std::size_t mark) {
        for (; trail_.size() > mark; trail_.pop_back()) *trail_.back().cell = trail_.back().old;
    }

    void touch(i32 t) {
        if (queued_[t]) return;
        queued_[t] = 1;
        queue_.push_back(t);
    }

    // Buffer i lies at `rest` or above; false if it cannot.
    bool raise(i32 i, i64 rest) {
        if (rest > capacity_ - size_[i]) return false;
        set(rest_[i], rest);
        for (i32 t = lower_[i]; t < upper_[i]; ++t) touch(t);
        return true;
    }

    // Draw all conclusions about the sections that were touched; false if some section overflows, or is not `sound`.
    bool settle(bool sound) {
        for (std::size_t at = 0; at < queue_.size(); ++at) {
            queued_[queue_[at]] = 0;
            sound = sound && refresh(queue_[at]);
        }
        queue_.clear();
        return sound;
    }

    // What cannot lie below a buffer must find room above it. So what rests higher than the demand of its section
    // permits must have others beneath, and rests no lower than where enough of them fit.
    bool refresh(i32 t) {
        if (demand_[t] == 0) return true;
        const auto [lowest, highest] = collect(t);
        if (lowest > floor_[t]) set(floor_[t], lowest);
        const i64 level = capacity_ - demand_[t];
        if (floor_[t] > level) return false;
        if (highest <= level) return true;
        sort_column(t);
        for (const Block& block : column_) {
            const i32 i = block.buffer;
            i64 rest = rest_[i];
            if (rest <= level) continue;
            auto next = std::upper_bound(column_.begin(), column_.end(), rest,
                                         [](i64 height, const Block& other) { return height < other.top; });
            i64 below = next == column_.begin() ? 0 : std::prev(next)->up_to;
            for (; rest > level + below; ++next) {
                if (next == column_.end()) return false;
                if (next->buffer == i) continue;
                rest = next->top;
                below += size_[next->buffer];
            }
            if (rest > rest_[i] && !raise(i, rest)) return false;
        }
        return true;
    }

    // The open buffers of section t, in column_; their lowest and their highest rest.
    std::pair<i64, i64> collect(i32 t) {
        column_.clear();
        i64 lowest = FAR, highest = 0;
        for (i64 at = first_[t]; at < first_[t + 1]; ++at) {
            const i32 i = living_[at];
            if (offset_[i] != OPEN) continue;
            column_.push_back({rest_[i] + size_[i], 0, i});
            lowest = std::min(lowest, rest_[i]);
            highest = std::max(highest, rest_[i]);
        }
        return {lowest, highest};
    }

    // By top. The order is kept for the next time, since tops hardly change from node to node.
    void sort_column(i32 t) {
        for (std::size_t at = 1; at < column_.size(); ++at) {
            const Block block = column_[at];
            std::size_t to = at;
            for (; to > 0 && column_[to - 1].top > block.top; --to) column_[to] = column_[to - 1];
            column_[to] = block;
        }
        const auto begin = living_.begin() + first_[t], end = living_.begin() + first_[t + 1];
        std::partition(begin, end, [&](i32 i) { return offset_[i] == OPEN; });
        auto at = begin;
        i64 sum = 0;
        for (Block& block : column_) {
            block.up_to = sum += size_[block.buffer];
            *at++ = block.buffer;
        }
    }

    Key key(i32 begin, i32 end, const std::vector<i32>& open) const {
        Key found{1, 2};
        for (i32 t = begin; t < end; ++t) {
            if (demand_[t] == 0) continue;
            const u64 cell = mix(static_cast<u64>(floor_[t]) * 0x100000001b3u + static_cast<u64>(t));
            found[0] += cell;
            found[1] ^= cell * 0xff51afd7ed558ccdu;
        }
        for (const i32 i : open) {
            found[0] += name_[i];
            found[1] ^= name_[i] * 0xff51afd7ed558ccdu;
        }
        return found;
    }

    // Put buffer i down; false if what is still `open` cannot be placed then.
    bool place(i32 i, i64 at, const std::vector<i32>& open) {
        const i64 top = at + size_[i];
        set(offset_[i], at);
        for (i32 t = lower_[i]; t < upper_[i]; ++t) {
            set(floor_[t], top);
            set(demand_[t], demand_[t] - size_[i]);
            touch(t);
        }
        return lift(lower_[i], upper_[i], top, open);
    }

    // Nothing that is open rests below `floor` in [begin, end).
    bool lift(i32 begin, i32 end, i64 floor, const std::vector<i32>& open) {
        bool sound = true;
        for (const i32 j : open)
            if (lower_[j] < end && begin < upper_[j] && rest_[j] < floor) sound = sound && raise(j, floor);
        return settle(sound);
    }

    bool exhausted() {
        if (++nodes > node_limit_) {
            out_of_time_ |= nodes > max_nodes_;
            return true;
        }
        if (nodes % 16 == 0) out_of_time_ |= *stop_ != 0 || Clock::now() > deadline_;
        return out_of_time_ || depth_ > DEEPEST;
    }

    // Place all of `open`, which live in [begin, end).
    Answer solve(i32 begin, i32 end, const std::vector<i32>& open) {
        if (open.empty()) return Answer::yes;
        const Key state = key(begin, end, open);
        if (failures_.contains(state)) return Answer::no;
        const auto parts = split(open);
        ++depth_;
        const Answer answer = !parts.empty() ? solve_apart(parts) : branch(begin, end, open);
        --depth_;
        if (answer == Answer::no) failures_.insert(state);
        return answer;
    }

    // Groups of `open` that no longer touch each other in time, the smallest first: it fails soonest.
    std::vector<std::vector<i32>> split(const std::vector<i32>& open) const {
        std::vector<std::vector<i32>> parts;
        i32 reach = lower_[open[0]];
        std::size_t begin = 0;
        for (std::size_t at = 0; at <= open.size(); ++at) {
            if (at == open.size() ? begin > 0 : lower_[open[at]] >= reach && at > 0) {
                parts.emplace_back(open.begin() + begin, open.begin() + at);
                begin = at;
            }
            if (at < open.size()) reach = std::max(reach, upper_[open[at]]);
        }
        std::stable_sort(parts.begin(), parts.end(), [](const auto& a, const auto& b) { return a.size() < b.size(); });
        return parts;
    }

    Answer solve_apart(const std::vector<std::vector<i32>>& parts) {
        for (const auto& part : parts) {
            i32 begin = lower_[part[0]], end = upper_[part[0]];
            for (const i32 i : part) begin = std::min(begin, lower_[i]), end = std::max(end, upper_[i]);
            const Answer answer = solve(begin, end, part);
            if (answer != Answer::yes) return answer;
        }
        return Answer::yes;
    }

    // The section to branch on. Only local minima: every buffer that rests there lies flat, so that putting it down
    // loses no room below it.
    i32 pick(i32 begin, i32 end, const std::vector<i32>& open) {
        std::fill(&count_[begin], &count_[end - 1] + 1, 0);
        for (const i32 i : open) {
            i64 lowest = FAR, rest = rest_[i];
            for (i32 t = lower_[i]; t < upper_[i]; ++t) lowest = std::min(lowest, floor_[t]);
            const i64 add = lowest == rest ? 1 : UNEVEN;
            for (i32 t = lower_[i]; t < upper_[i]; ++t) count_[t] += floor_[t] == rest ? add : 0;
        }
        i32 best = -1;
        double best_score = std::numeric_limits<double>::infinity();
        for (i32 t = begin; t < end; ++t) {
            if (count_[t] == 0 || count_[t] >= UNEVEN) continue;
            const double score = judge(t, static_cast<double>(count_[t]));
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
        const i64 floor = floor_[t];
        std::vector<i32> here;
        for (i64 at = first_[t]; at < first_[t + 1]; ++at)
            if (offset_[living_[at]] == OPEN && rest_[living_[at]] == floor) here.push_back(living_[at]);
        std::sort(here.begin(), here.end(), [&](i32 a, i32 b) { return rank_[a] > rank_[b]; });
        std::vector<std::tuple<i32, i32, i64>> tried;
        std::vector<i32> others;
        const std::size_t mark = trail_.size();
        for (const i32 i : here) {
            const std::tuple<i32, i32, i64> twin{lower_[i], upper_[i], size_[i]};
            if (std::find(tried.begin(), tried.end(), twin) != tried.end()) continue;
            tried.push_back(twin);
            if (exhausted()) return Answer::unknown;
            others.clear();
            for (const i32 j : open)
                if (j != i) others.push_back(j);
            const Answer answer = place(i, floor, others) ? solve(begin, end, others) : Answer::no;
            if (answer != Answer::no) return answer;
            undo(mark);
        }
        const i64 raised = next_rest(t, here, open);
        if (raised == FAR || raised + demand_[t] > capacity_) return Answer::no;
        if (exhausted()) return Answer::unknown;
        return lift(t, t + 1, raised, open) ? solve(begin, end, open) : Answer::no;
    }

    // The lowest place above its floor where a buffer of section t can come to lie: where one rests higher already, or
    // on top of a buffer that was put below it.
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

    struct Change { i64* cell; i64 old; };

    struct Block {
        i64 top;    // the lowest that it can have
        i64 up_to;  // sizes of all whose top is no higher
        i32 buffer;
    };

    static constexpr i64 BASE = 100;
    static constexpr i64 DEEPEST = 3000;  // levels of half a KB, on a stack that may have no more than 2 MB
    static constexpr i64 OPEN = -1;
    static constexpr i64 UNEVEN = i64{1} << 32;

    const i32 n_, sections_;
    const i32* const lower_;
    const i32* const upper_;
    const i64* const size_;
    const i64 capacity_;
    std::vector<i64> first_;  // of section t in living_
    std::vector<i32> living_;
    std::vector<i64> floor_, demand_, rest_, offset_;
    std::vector<Change> trail_;
    std::vector<i32> queue_;
    std::vector<char> queued_;
    std::vector<Block> column_;
    std::vector<i64> count_;
    std::vector<u64> name_;
    std::vector<double> rank_;
    Failures failures_;
    Random random_;
    Rule rule_ = Rule::fewest;
    i64 node_limit_ = 0, max_nodes_ = 0, depth_ = 0;
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
