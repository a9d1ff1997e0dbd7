// The planned allocator under torch's CPU tensors.
//
// Small requests, and all of them while nothing is on, get the base allocator's own block with its own deleter: they
// cost one comparison, and their frees nothing. The plan is followed on the thread that started it: a CPU backward runs
// there too, while loaders and hooks elsewhere have an order of their own.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstring>

#include "session.hpp"

namespace distrain {

Session& session() {
  static Session& one = *new Session({
      [](size_t bytes) -> void* {
        void* arena = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return arena == MAP_FAILED ? nullptr : arena;
      },
      [](void* arena, size_t bytes) { munmap(arena, bytes); },
  });
  return one;
}

namespace {

class CpuAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    if (!session().concerns(size)) return base->allocate(size);
    const bool ours = pthread_equal(pthread_self(), owner);
    void* block = session().take(size, ours);
    if (!block) {
      block = base->raw_allocate(size);
      session().placed(block, size, ours);
    }
    return {block, block, &give_back, c10::Device(c10::kCPU)};
  }

  // For blocks of either kind: what the base allocator gave has its pointer as context too.
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* target, const void* source, std::size_t num) const override { std::memcpy(target, source, num); }

  c10::Allocator* base = nullptr;
  std::atomic<pthread_t> owner{};

 private:
  static void give_back(void* block);
};

CpuAllocator& allocator() {
  static CpuAllocator& one = *new CpuAllocator;
  return one;
}

void CpuAllocator::give_back(void* block) {
  if (block && !session().release(block, pthread_equal(pthread_self(), allocator().owner)))
    allocator().base->raw_deallocate(block);
}

// torch installs a new allocator only over one of the same priority or less, and remembers the priority for good. It
// writes one pointer without a lock: requests under way on other threads see one allocator or the other; both will do.
constexpr uint8_t PRIORITY = 10;

}  // namespace
}  // namespace distrain

extern "C" {

// 0, or why the allocator cannot be put in place: 1 the one beneath has changed, 2 it has no plain blocks, 3 it has
// priority. In the child of a fork it may be in place already.
int distrain_cpu_install() {
  auto& ours = distrain::allocator();
  c10::Allocator* present = c10::GetCPUAllocator();
  if (!ours.base) {
    if (!present->raw_deleter()) return 2;
    ours.base = present;
    distrain::guard_forks();
  }
  if (present != ours.base && present != &ours) return 1;
  ours.owner = pthread_self();
  c10::SetCPUAllocator(&ours, distrain::PRIORITY);
  return c10::GetCPUAllocator() == &ours ? 0 : 3;
}

void distrain_cpu_uninstall() {
  auto& ours = distrain::allocator();
  if (ours.base && c10::GetCPUAllocator() == &ours) c10::SetCPUAllocator(ours.base, distrain::PRIORITY);
}
}
