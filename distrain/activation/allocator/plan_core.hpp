// Following a plan of addresses, safely: matching, guard and statistics, for any kind of memory.
//
// A plan says which request of a step gets which offset in one arena. A program may leave it at any moment, so what the
// plan says is a suggestion, and three parts decide:
//
//   Matcher     which entry of the plan is this request?      by phase, position and size; finds its way back
//   Occupancy   is the entry's place free at this moment?     one bit for each cell between two addresses of the plan
//   Replay      both, and who lives where; counts everything
//
//     addresses  |----- a -----|-- b --|     The plan's addresses cut the arena into cells, known ahead. A block covers
//                   |------ c ------|        a run of cells; taking it is testing and setting a run of bits, and no
//     cells      |1 |    2     | 3  |4 |     list or map grows or shrinks while the program runs.
//
// Whatever the program does, no two living blocks share a byte, because a block is only handed out if all bits of its
// run are zero. What cannot be served returns nullptr, and the caller asks the allocator beneath.
//
// Nothing here locks: session.hpp does.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace distrain {

constexpr int64_t NOT_PLANNED = -1;  // an offset: the request is expected, and the allocator beneath is to serve it
constexpr int32_t NO_ENTRY = -1;

// Order and names as in report.py.
enum Count {
  HITS,            // served from the arena
  UNPLANNED,       // expected, but without a place: it outlives the step
  EXTRA,           // not what the plan expects here
  OCCUPIED,        // expected, but its place is still in use
  ELSEWHERE,       // from another thread or stream than the plan's
  SKIPPED,         // entries that a finished step never asked for
  RESYNCS,         // times that the plan was found again
  STEPS,           // finished steps
  FOREIGN_FREES,   // blocks of the arena given back by another thread
  LIVE_BLOCKS,     // of the arena, now
  LIVE_BYTES,      // of the arena, now
  TOP_BYTES,       // highest end of a block so far: what the arena really needed
  OTHER_BYTES,     // large blocks of the allocator beneath that were asked for since the start and live now
  OTHER_PEAK,      // most of them at once
  TOTAL_PEAK,      // most bytes at once, of both
  NUM_COUNTS
};

using Counts = int64_t[NUM_COUNTS];

struct Entry {
  int32_t phase;
  int64_t size;    // as requested
  int64_t offset;  // in the arena, or NOT_PLANNED
};

// Aligns the requests of a step with the entries of a plan. Each phase has its own position, so that what goes astray
// in one phase cannot spoil the next.
class Matcher {
 public:
  // How far from the expected position a lost request is looked for: a few layers, and cheap enough for every miss.
  static constexpr int32_t WINDOW = 512;

  // Phases of the entries must ascend.
  explicit Matcher(const std::vector<Entry>& entries) {
    sizes_.reserve(entries.size());
    for (const Entry& entry : entries) sizes_.push_back(entry.size);
    const int32_t num_phases = entries.empty() ? 0 : entries.back().phase + 1;
    for (int32_t phase = 0; phase <= num_phases; ++phase) {
      auto begin = std::partition_point(entries.begin(), entries.end(),
                                        [phase](const Entry& entry) { return entry.phase < phase; });
      starts_.push_back(static_cast<int32_t>(begin - entries.begin()));
    }
    restart();
  }

  void restart() {
    positions_.assign(starts_.begin(), starts_.end() - 1);
    enter(0);
  }

  // A phase that was left and is entered again goes on where it was; one that the plan lacks has no entries.
  void enter(int32_t phase) {
    phase_ = phase;
    missed_ = 0;
  }

  // The entry that this request is, or NO_ENTRY.
  //
  // The expected one if the size is right: a tensor too many costs nothing but itself. Otherwise two requests in a row
  // that are not expected must be found side by side in the plan, so that a tensor too few costs one more, and chance
  // seldom misleads. It may mislead: both directions are searched, so there is a way back, and the guard is behind.
  int32_t next(int64_t size) {
    if (phase_ < 0 || static_cast<size_t>(phase_) >= positions_.size()) return NO_ENTRY;
    int32_t& position = positions_[phase_];
    if (position < starts_[phase_ + 1] && sizes_[position] == size) {
      missed_ = 0;
      return position++;
    }
    const int32_t found = missed_ ? nearest(missed_, size) : NO_ENTRY;
    missed_ = found == NO_ENTRY ? size : 0;
    if (found != NO_ENTRY) {
      ++num_resyncs;
      position = found + 1;
    }
    return found;
  }

  int64_t num_resyncs = 0;

 private:
  // The entry nearest to the position that has `size` and follows one of size `before`.
  int32_t nearest(int64_t before, int64_t size) const {
    const int32_t first = starts_[phase_] + 1, end = starts_[phase_ + 1], position = positions_[phase_];
    for (int32_t distance = 1; distance <= WINDOW; ++distance)
      for (int32_t index : {position + distance, position - distance})
        if (index >= first && index < end && sizes_[index] == size && sizes_[index - 1] == before) return index;
    return NO_ENTRY;
  }

  std::vector<int64_t> sizes_;
  std::vector<int32_t> starts_;     // of each phase, and the end of the last
  std::vector<int32_t> positions_;  // of each phase: the entry expected next
  int32_t phase_ = 0;
  int64_t missed_ = 0;  // size of the request just before, if it was not expected
};

// A run of cells, the last excluded.
struct Run {
  int32_t first, last;
};

// Which cells of the arena are in use.
class Occupancy {
 public:
  explicit Occupancy(int32_t num_cells) : words_((static_cast<size_t>(num_cells) + 63) / 64) {}

  bool is_free(Run run) const {
    return !each(run, [this](size_t word, uint64_t mask) { return (words_[word] & mask) != 0; });
  }
  void set(Run run) {
    each(run, [this](size_t word, uint64_t mask) { words_[word] |= mask; return false; });
  }
  void clear(Run run) {
    each(run, [this](size_t word, uint64_t mask) { words_[word] &= ~mask; return false; });
  }

 private:
  // Calls visit(word, mask) for the words of a run, until one returns true; whether one did.
  template <class Visit>
  static bool each(Run run, Visit visit) {
    const size_t first = run.first / 64, last = (run.last - 1) / 64;
    for (size_t word = first; word <= last; ++word) {
      uint64_t mask = ~uint64_t{0};
      if (word == first) mask &= ~uint64_t{0} << (run.first % 64);
      if (word == last) mask &= ~uint64_t{0} >> (63 - (run.last - 1) % 64);
      if (visit(word, mask)) return true;
    }
    return false;
  }

  std::vector<uint64_t> words_;
};

// One arena under one plan. It outlives the session that made it for as long as a block in it lives.
class Replay {
 public:
  // Entries by ascending phase, within 0 <= offset and offset + size <= arena_bytes; `arena` stays the caller's.
  Replay(std::vector<Entry> entries, char* arena, int64_t arena_bytes)
      : arena(arena), arena_bytes(arena_bytes), entries_(std::move(entries)), matcher_(entries_), occupancy_(0) {
    for (const Entry& entry : entries_) {
      if (entry.offset == NOT_PLANNED) continue;
      edges_.push_back(entry.offset);
      edges_.push_back(entry.offset + entry.size);
    }
    std::sort(edges_.begin(), edges_.end());
    edges_.erase(std::unique(edges_.begin(), edges_.end()), edges_.end());
    for (const Entry& entry : entries_) {
      const bool planned = entry.offset != NOT_PLANNED;
      runs_.push_back(planned ? Run{cell(entry.offset), cell(entry.offset + entry.size)} : Run{0, 0});
    }
    occupancy_ = Occupancy(static_cast<int32_t>(edges_.size()));
    holders_.assign(edges_.size(), NO_ENTRY);
  }

  // The planned place of the step's next request, or nullptr.
  char* take(int64_t size) {
    ++num_requests_;
    const int32_t index = matcher_.next(size);
    counts[RESYNCS] = matcher_.num_resyncs;
    if (index == NO_ENTRY) return missed(EXTRA);
    ++num_found_;
    const Entry& entry = entries_[index];
    if (entry.offset == NOT_PLANNED) return missed(UNPLANNED);
    const Run run = runs_[index];
    if (!occupancy_.is_free(run)) return missed(OCCUPIED);
    occupancy_.set(run);
    holders_[run.first] = index;
    ++counts[HITS];
    ++counts[LIVE_BLOCKS];
    counts[LIVE_BYTES] += size;
    counts[TOP_BYTES] = std::max(counts[TOP_BYTES], entry.offset + size);
    note_peak();
    return arena + entry.offset;
  }

  bool holds(const void* pointer) const { return pointer >= arena && pointer < arena + arena_bytes; }

  // Take back a block of the arena; whether it was alive.
  bool release(const void* pointer) {
    const int64_t offset = static_cast<const char*>(pointer) - arena;
    const auto edge = std::lower_bound(edges_.begin(), edges_.end(), offset);
    if (edge == edges_.end() || *edge != offset) return false;
    int32_t& holder = holders_[edge - edges_.begin()];
    if (holder == NO_ENTRY) return false;
    occupancy_.clear(runs_[holder]);
    --counts[LIVE_BLOCKS];
    counts[LIVE_BYTES] -= entries_[holder].size;
    holder = NO_ENTRY;
    return true;
  }

  void enter(int32_t phase) { matcher_.enter(phase); }

  // The step is over, if there was one: the next request is the plan's first again.
  void new_step() {
    if (num_requests_) {
      ++counts[STEPS];
      counts[SKIPPED] += std::max<int64_t>(0, static_cast<int64_t>(entries_.size()) - num_found_);
    }
    num_requests_ = num_found_ = 0;
    matcher_.restart();
  }

  // Bytes of the allocator beneath, so that peaks are known.
  void other(int64_t change) {
    counts[OTHER_BYTES] += change;
    counts[OTHER_PEAK] = std::max(counts[OTHER_PEAK], counts[OTHER_BYTES]);
    note_peak();
  }

  char* const arena;
  const int64_t arena_bytes;
  Counts counts = {};

 private:
  char* missed(Count reason) {
    ++counts[reason];
    return nullptr;
  }

  void note_peak() { counts[TOTAL_PEAK] = std::max(counts[TOTAL_PEAK], counts[LIVE_BYTES] + counts[OTHER_BYTES]); }

  int32_t cell(int64_t edge) const {
    return static_cast<int32_t>(std::lower_bound(edges_.begin(), edges_.end(), edge) - edges_.begin());
  }

  std::vector<Entry> entries_;
  Matcher matcher_;
  std::vector<int64_t> edges_;    // addresses at which blocks begin or end; cell i starts at edge i
  std::vector<Run> runs_;         // of each entry
  Occupancy occupancy_;
  std::vector<int32_t> holders_;  // the living entry that begins at each cell
  int64_t num_requests_ = 0, num_found_ = 0;  // of this step
};

// What a step asks for, so that it can be planned.
class Recorder {
 public:
  struct Request {
    int32_t step, phase;
    int64_t size, born, died;  // in events since the start; died is -1 while it lives
  };

  int32_t born(int64_t size) {
    requests.push_back({step_, phase_, size, now_++, -1});
    return static_cast<int32_t>(requests.size()) - 1;
  }
  void died(int32_t request) { requests[request].died = now_++; }
  void enter(int32_t phase) { phase_ = phase; }

  // Ends the step, unless nothing has been asked for in it.
  void new_step() {
    step_ += !requests.empty() && requests.back().step == step_;
    phase_ = 0;
  }

  std::vector<Request> requests;
  Counts counts = {};

 private:
  int32_t step_ = 0, phase_ = 0;
  int64_t now_ = 0;
};

}  // namespace distrain
