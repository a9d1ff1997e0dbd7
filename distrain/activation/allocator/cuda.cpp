// The planned allocator behind torch.cuda.memory.CUDAPluggableAllocator. It compiles without CUDA, and opens libcudart
// when it is used.
//
// Kernels run later than the calls that free their memory, so an address may be given away anew at once only where
// order is kept: the plan is followed on one stream of one device. Every other request goes to the stream-ordered pools
// of CUDA, as do small ones. A block that another stream has read (record_stream) is given back behind an event of that
// stream:
//
//     compute   alloc x ── kernels ───────────────────────── free x: wait for e ── next block at x's address
//     copies                 └─ record_stream(x) ── copy x ── e ┘
//
// torch allows only one change of allocator, before the first CUDA tensor; plans come and go beneath it.

#include <dlfcn.h>

#include <array>
#include <stdexcept>
#include <string>

#include "session.hpp"

namespace distrain {
namespace {

using Stream = void*;  // cudaStream_t
using Event = void*;   // cudaEvent_t
using Pool = void*;    // cudaMemPool_t

constexpr int POOLS_SUPPORTED = 115;    // cudaDevAttrMemoryPoolsSupported
constexpr int RELEASE_THRESHOLD = 4;    // cudaMemPoolAttrReleaseThreshold
constexpr unsigned NO_TIMING = 2;       // cudaEventDisableTiming
constexpr size_t MOST_DEVICES = 64;

// What is used of libcudart, by its names.
struct Runtime {
  int (*cudaMalloc)(void**, size_t);
  int (*cudaFree)(void*);
  int (*cudaMallocAsync)(void**, size_t, Stream);
  int (*cudaFreeAsync)(void*, Stream);
  int (*cudaGetDevice)(int*);
  int (*cudaSetDevice)(int);
  int (*cudaDeviceGetAttribute)(int*, int, int);
  int (*cudaDeviceGetDefaultMemPool)(Pool*, int);
  int (*cudaMemPoolSetAttribute)(Pool, int, void*);
  int (*cudaMemPoolTrimTo)(Pool, size_t);
  int (*cudaDeviceSynchronize)();
  int (*cudaEventCreateWithFlags)(Event*, unsigned);
  int (*cudaEventRecord)(Event, Stream);
  int (*cudaEventDestroy)(Event);
  int (*cudaStreamWaitEvent)(Stream, Event, unsigned);
  int (*cudaGetLastError)();
  const char* (*cudaGetErrorString)(int);
};

Runtime runtime;

void check(int error, const char* what) {
  if (!error) return;
  runtime.cudaGetLastError();  // or it would be reported again, by somebody else's call
  throw std::runtime_error(std::string(what) + ": " + runtime.cudaGetErrorString(error));
}

class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(runtime.cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(runtime.cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) runtime.cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// The allocator beneath.
class Pools {
 public:
  void* get(size_t size, int device, Stream stream) {
    void* block = nullptr;
    const int error = pooled(device) ? runtime.cudaMallocAsync(&block, size, stream) : runtime.cudaMalloc(&block, size);
    check(error, ("CUDA has no " + std::to_string(size) + " bytes on device " + std::to_string(device)).c_str());
    return block;
  }
  void give_back(void* block, int device, Stream stream) {
    check(pooled(device) ? runtime.cudaFreeAsync(block, stream) : runtime.cudaFree(block), "cudaFree");
  }

  // Memory for an arena. What the pool keeps from steps without a plan would take its room, and goes first.
  void* arena(size_t size, int device) {
    const OnDevice there(device);
    void* block = nullptr;
    if (pooled(device)) {
      Pool pool = nullptr;
      check(runtime.cudaDeviceSynchronize(), "cudaDeviceSynchronize");
      check(runtime.cudaDeviceGetDefaultMemPool(&pool, device), "cudaDeviceGetDefaultMemPool");
      check(runtime.cudaMemPoolTrimTo(pool, 0), "cudaMemPoolTrimTo");
    }
    check(runtime.cudaMalloc(&block, size), "cudaMalloc");
    return block;
  }

 private:
  // Whether the device has pools; the first time, tells its pool to keep what is freed.
  bool pooled(int device) {
    std::atomic<int>& known = known_.at(static_cast<size_t>(device));
    if (known == UNKNOWN) {
      int supported = 0;
      Pool pool = nullptr;
      uint64_t everything = UINT64_MAX;
      check(runtime.cudaDeviceGetAttribute(&supported, POOLS_SUPPORTED, device), "cudaDeviceGetAttribute");
      if (supported) {
        check(runtime.cudaDeviceGetDefaultMemPool(&pool, device), "cudaDeviceGetDefaultMemPool");
        check(runtime.cudaMemPoolSetAttribute(pool, RELEASE_THRESHOLD, &everything), "cudaMemPoolSetAttribute");
      }
      known = supported ? YES : NO;
    }
    return known == YES;
  }

  enum { UNKNOWN, NO, YES };
  std::array<std::atomic<int>, MOST_DEVICES> known_{};
};

// Streams other than its own that have used a block.
class Readers {
 public:
  void add(const void* block, Stream stream) {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (const auto& known : pairs_)
      if (known.first == block && known.second == stream) return;
    pairs_.emplace_back(block, stream);
    num_ = pairs_.size();
  }

  // Lets `stream` wait for all that the block's readers have been given to do.
  void settle(const void* block, Stream stream) {
    if (!num_) return;  // a block's readers were added before it is freed, by program order or the caller's own
    const std::lock_guard<std::mutex> guard(mutex_);
    auto mine = std::partition(pairs_.begin(), pairs_.end(), [block](const auto& each) { return each.first != block; });
    for (auto reader = mine; reader != pairs_.end(); ++reader) {
      if (reader->second == stream) continue;
      Event event = nullptr;
      check(runtime.cudaEventCreateWithFlags(&event, NO_TIMING), "cudaEventCreate");
      check(runtime.cudaEventRecord(event, reader->second), "cudaEventRecord");
      check(runtime.cudaStreamWaitEvent(stream, event, 0), "cudaStreamWaitEvent");
      check(runtime.cudaEventDestroy(event), "cudaEventDestroy");
    }
    pairs_.erase(mine, pairs_.end());
    num_ = pairs_.size();
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<const void*, Stream>> pairs_;
  std::atomic<size_t> num_{0};
};

// Whose requests may follow a plan.
struct Lane {
  std::atomic<bool> is_used{false};
  std::atomic<int> device{0};
  std::atomic<Stream> stream{nullptr};

  bool is(int other_device, Stream other_stream) const { return device == other_device && stream == other_stream; }
};

// Never destroyed: tensors may outlive everything.
Pools& pools = *new Pools;
Readers& readers = *new Readers;
Lane& lane = *new Lane;

}  // namespace

Session& session() {
  static Session& one = *new Session({
      [](size_t bytes) -> void* {
        try {
          return pools.arena(bytes, lane.device);
        } catch (const std::runtime_error&) {
          return nullptr;  // the caller is Python, and says so there
        }
      },
      [](void* arena, size_t) { runtime.cudaFree(arena); },  // waits for the device
  });
  return one;
}

}  // namespace distrain

extern "C" {

// Find libcudart, once; an empty string, or what is wrong.
const char* distrain_cuda_open(const char* path) {
  using namespace distrain;
  static std::string problem;
  problem.clear();
  if (runtime.cudaMalloc) return "";
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return (problem = dlerror()).c_str();
  Runtime found;
  const auto find = [&](const char* name, auto& function) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    if (!function) problem += std::string(problem.empty() ? "" : ", ") + "lacks " + name;
  };
#define FIND(name) find(#name, found.name)
  FIND(cudaMalloc), FIND(cudaFree), FIND(cudaMallocAsync), FIND(cudaFreeAsync), FIND(cudaGetDevice);
  FIND(cudaSetDevice), FIND(cudaDeviceGetAttribute), FIND(cudaDeviceGetDefaultMemPool);
  FIND(cudaMemPoolSetAttribute), FIND(cudaMemPoolTrimTo), FIND(cudaDeviceSynchronize), FIND(cudaStreamWaitEvent);
  FIND(cudaEventCreateWithFlags), FIND(cudaEventRecord), FIND(cudaEventDestroy), FIND(cudaGetLastError);
  FIND(cudaGetErrorString);
#undef FIND
  if (problem.empty()) {
    runtime = found;
    guard_forks();
  }
  return problem.c_str();
}

// Whether torch's requests come here.
void distrain_cuda_mark_used() { distrain::lane.is_used = true; }
int distrain_cuda_is_used() { return distrain::lane.is_used; }

// The stream of the device that plans are for.
void distrain_cuda_follow(int device, void* stream) {
  distrain::lane.device = device;
  distrain::lane.stream = stream;
}

// The three functions that torch calls. Errors are thrown, and torch raises them as RuntimeError.

void* distrain_cuda_alloc(ssize_t size, int device, void* stream) {
  using namespace distrain;
  if (size <= 0) return nullptr;
  const OnDevice there(device);
  const auto bytes = static_cast<size_t>(size);
  if (!session().concerns(bytes)) return pools.get(bytes, device, stream);
  const bool ours = lane.is(device, stream);
  if (void* block = session().take(bytes, ours)) return block;
  void* block = pools.get(bytes, device, stream);
  session().placed(block, bytes, ours);
  return block;
}

void distrain_cuda_free(void* block, ssize_t, int device, void* stream) {
  using namespace distrain;
  if (!block) return;
  const OnDevice there(device);
  readers.settle(block, stream);
  if (!session().release(block, lane.is(device, stream))) pools.give_back(block, device, stream);
}

void distrain_cuda_record_stream(void* block, void* stream) { distrain::readers.add(block, stream); }
}
