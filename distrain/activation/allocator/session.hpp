// What the adapters of all kinds of memory share: one lock around plan_core.hpp, what is on, and the C interface.
//
//               off                    record                         replay
//   request     base                   base, written down             arena if planned and free, else base
//   free        arena's or base's, by address, in every mode: blocks outlive sessions, and arenas their last block
//
// An adapter gives a `Memory` for arenas, defines `session()`, asks `concerns` before anything else (no lock is taken
// for small requests or while nothing is on), then `take`, and reports what base gave instead with `placed`.
//
// The child of a fork has copies of all blocks and goes on without a plan. The lock is held across the fork, so that it
// is in order on both sides.

#pragma once

#include <pthread.h>

#include <atomic>
#include <memory>
#include <mutex>

#include "plan_core.hpp"

namespace distrain {

struct Memory {
  void* (*get)(size_t bytes);
  void (*give_back)(void* arena, size_t bytes);
};

// Blocks of the allocator beneath, by address: open addressing, so that a block costs no allocation.
class BlockTable {
 public:
  struct Block {
    const void* pointer;
    int64_t size;
    int32_t request;  // of the recorder, or NO_ENTRY
  };

  bool empty() const { return num_ == 0; }
  void clear() { *this = BlockTable(); }

  void insert(Block block) {
    if (2 * (num_ + 1) > slots_.size()) grow();
    size_t slot = home(block.pointer);
    while (slots_[slot].pointer) slot = following(slot);
    slots_[slot] = block;
    ++num_;
  }

  // Takes out the block at `pointer`; whether there is one.
  bool remove(const void* pointer, Block& block) {
    if (empty()) return false;
    size_t hole = home(pointer);
    while (slots_[hole].pointer != pointer) {
      if (!slots_[hole].pointer) return false;
      hole = following(hole);
    }
    block = slots_[hole];
    for (size_t slot = following(hole); slots_[slot].pointer; slot = following(slot)) {
      const size_t wish = home(slots_[slot].pointer);  // move up what would no longer be found
      if (((slot - wish) & mask()) >= ((slot - hole) & mask())) {
        slots_[hole] = slots_[slot];
        hole = slot;
      }
    }
    slots_[hole].pointer = nullptr;
    --num_;
    return true;
  }

 private:
  size_t mask() const { return slots_.size() - 1; }
  size_t following(size_t slot) const { return (slot + 1) & mask(); }
  size_t home(const void* pointer) const {
    return (reinterpret_cast<uintptr_t>(pointer) * 0x9E3779B97F4A7C15u >> 32) & mask();
  }
  void grow() {
    std::vector<Block> old(slots_.empty() ? 1024 : 2 * slots_.size(), Block{nullptr, 0, NO_ENTRY});
    old.swap(slots_);
    num_ = 0;
    for (const Block& block : old)
      if (block.pointer) insert(block);
  }

  std::vector<Block> slots_;
  size_t num_ = 0;
};

class Session {
 public:
  explicit Session(Memory memory) : memory_(memory) {}

  // Whether a request is to go through take() and placed().
  bool concerns(size_t size) const { return size >= least_.load(std::memory_order_relaxed); }

  // The planned block, or nullptr. `ours`: the request comes from the thread or stream that the plan is for.
  void* take(size_t size, bool ours) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (!replay_) return nullptr;
    if (ours) return replay_->take(static_cast<int64_t>(size));
    ++replay_->counts[ELSEWHERE];
    return nullptr;
  }

  // The allocator beneath has served a request.
  void placed(const void* pointer, size_t size, bool ours) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (!pointer || (!replay_ && !recorder_)) return;
    const auto bytes = static_cast<int64_t>(size);
    blocks_.insert({pointer, bytes, recorder_ && ours ? recorder_->born(bytes) : NO_ENTRY});
    other(bytes);
  }

  // Takes note of a free; whether the block was an arena's and nothing is left to do.
  bool release(void* pointer, bool ours) {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (size_t index = 0; index < arenas_.size(); ++index) {
      Replay& replay = *arenas_[index];
      if (!replay.holds(pointer)) continue;
      if (replay.release(pointer)) {
        replay.counts[FOREIGN_FREES] += !ours;
        drop_if_unused(index);
      }
      return true;
    }
    BlockTable::Block block;
    if (blocks_.remove(pointer, block)) {
      if (block.request != NO_ENTRY) recorder_->died(block.request);
      other(-block.size);
    }
    return false;
  }

  // Starts a recording; nothing may be on.
  void record(size_t least) {
    const std::lock_guard<std::mutex> guard(mutex_);
    recorder_ = std::make_unique<Recorder>();
    least_ = std::max<size_t>(least, 1);
  }

  // Starts to follow a plan; nothing may be on. Whether there was memory for the arena.
  bool replay(std::vector<Entry> entries, size_t arena_bytes, size_t least) {
    char* arena = arena_bytes ? static_cast<char*>(memory_.get(arena_bytes)) : nullptr;
    if (arena_bytes && !arena) return false;
    const std::lock_guard<std::mutex> guard(mutex_);
    arenas_.push_back(std::make_unique<Replay>(std::move(entries), arena, static_cast<int64_t>(arena_bytes)));
    replay_ = arenas_.back().get();
    least_ = std::max<size_t>(least, 1);
    return true;
  }

  // Ends what is on. Its last step counts, its recording is kept until the next one starts, blocks stay valid.
  void stop() {
    const std::lock_guard<std::mutex> guard(mutex_);
    least_ = NEVER;
    blocks_.clear();
    if (recorder_) {
      std::copy_n(recorder_->counts, NUM_COUNTS, last_);
      recorded_ = std::move(recorder_);
    }
    if (replay_) {
      replay_->new_step();
      std::copy_n(replay_->counts, NUM_COUNTS, last_);
      replay_ = nullptr;
      drop_if_unused(arenas_.size() - 1);
    }
  }

  void new_step() {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (recorder_) recorder_->new_step();
    if (replay_) replay_->new_step();
  }

  void enter(int32_t phase) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (recorder_) recorder_->enter(phase);
    if (replay_) replay_->enter(phase);
  }

  // Of what is on, or else of what was on last.
  void counts(int64_t* out) {
    const std::lock_guard<std::mutex> guard(mutex_);
    std::copy_n(recorder_ ? recorder_->counts : replay_ ? replay_->counts : last_, NUM_COUNTS, out);
  }

  // Runs `read` on the requests recorded so far, or by the last recording.
  template <class Read>
  void recorded(Read read) {
    const std::lock_guard<std::mutex> guard(mutex_);
    static const std::vector<Recorder::Request> nothing;
    read(recorder_ ? recorder_->requests : recorded_ ? recorded_->requests : nothing);
  }

  bool is_on() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return replay_ || recorder_;
  }

  size_t num_arenas() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return arenas_.size();
  }

  void before_fork() { mutex_.lock(); }
  void after_fork_in_parent() { mutex_.unlock(); }
  void after_fork_in_child() {
    least_ = NEVER;
    replay_ = nullptr;
    recorder_.reset();
    blocks_.clear();
    mutex_.unlock();
  }

 private:
  static constexpr size_t NEVER = SIZE_MAX;

  void other(int64_t change) {
    if (replay_) return replay_->other(change);
    int64_t* counts = recorder_->counts;
    counts[OTHER_BYTES] += change;
    counts[OTHER_PEAK] = counts[TOTAL_PEAK] = std::max(counts[OTHER_PEAK], counts[OTHER_BYTES]);
  }

  void drop_if_unused(size_t index) {
    Replay& replay = *arenas_[index];
    if (&replay == replay_ || replay.counts[LIVE_BLOCKS]) return;
    if (replay.arena) memory_.give_back(replay.arena, static_cast<size_t>(replay.arena_bytes));
    arenas_.erase(arenas_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  const Memory memory_;
  std::mutex mutex_;
  std::atomic<size_t> least_{NEVER};  // smallest request that concerns what is on
  std::unique_ptr<Recorder> recorder_, recorded_;
  std::vector<std::unique_ptr<Replay>> arenas_;  // in use: the one that is on, and those in which blocks live
  Replay* replay_ = nullptr;                     // the one that is on
  BlockTable blocks_;
  Counts last_ = {};
};

// The adapter's one session; never destroyed, since tensors may outlive everything.
Session& session();

// Forks must find the lock free. The adapter calls this once.
inline void guard_forks() {
  pthread_atfork([] { session().before_fork(); }, [] { session().after_fork_in_parent(); },
                 [] { session().after_fork_in_child(); });
}

}  // namespace distrain

// The part of the C interface that is the same for all adapters.
extern "C" {

void distrain_record(int64_t least) { distrain::session().record(static_cast<size_t>(least)); }

int distrain_replay(int64_t num, const int32_t* phases, const int64_t* sizes, const int64_t* offsets,
                    int64_t arena_bytes, int64_t least) {
  std::vector<distrain::Entry> entries;
  entries.reserve(static_cast<size_t>(num));
  for (int64_t index = 0; index < num; ++index) entries.push_back({phases[index], sizes[index], offsets[index]});
  return distrain::session().replay(std::move(entries), static_cast<size_t>(arena_bytes), static_cast<size_t>(least));
}

int distrain_is_on() { return distrain::session().is_on(); }
void distrain_stop() { distrain::session().stop(); }
void distrain_new_step() { distrain::session().new_step(); }
void distrain_enter(int32_t phase) { distrain::session().enter(phase); }
void distrain_counts(int64_t* out) { distrain::session().counts(out); }
int64_t distrain_num_counts() { return distrain::NUM_COUNTS; }
int64_t distrain_num_arenas() { return static_cast<int64_t>(distrain::session().num_arenas()); }

int64_t distrain_num_recorded() {
  int64_t num = 0;
  distrain::session().recorded([&num](const auto& requests) { num = static_cast<int64_t>(requests.size()); });
  return num;
}

// Five numbers for each request, the first `num`: step, phase, size, born, died.
void distrain_recorded(int64_t num, int64_t* out) {
  distrain::session().recorded([num, out](const auto& requests) mutable {
    for (int64_t index = 0; index < num; ++index) {
      const auto& each = requests[static_cast<size_t>(index)];
      for (int64_t value : {int64_t{each.step}, int64_t{each.phase}, each.size, each.born, each.died}) *out++ = value;
    }
  });
}
}
