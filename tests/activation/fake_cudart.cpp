// A libcudart for machines without CUDA: memory of the host, a log of what was asked, and a limit.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

static std::string log_;
static int device_ = 0, events_ = 0, failed_ = 0;
static int64_t limit_ = INT64_MAX, used_ = 0;
static bool pools_ = true;

static void note(const char* what, uintptr_t a, uintptr_t b) {
  char line[100];
  snprintf(line, sizeof line, "%s %lu %lu\n", what, (unsigned long)a, (unsigned long)b);
  log_ += line;
}

static int get(void** block, size_t size) {
  if (used_ + (int64_t)size > limit_) return failed_ = 2;
  used_ += size;
  char* raw = (char*)malloc(size + 512 + 64);
  char* aligned = (char*)(((uintptr_t)raw + 64 + 511) / 512 * 512);
  ((void**)aligned)[-1] = raw;
  ((size_t*)aligned)[-2] = size;
  *block = aligned;
  return 0;
}

static int give_back(void* block) {
  used_ -= ((size_t*)block)[-2];
  free(((void**)block)[-1]);
  return 0;
}

extern "C" {
const char* fake_log() { return log_.c_str(); }
void fake_reset(int64_t limit, int pools) { log_.clear(); limit_ = limit; pools_ = pools; }
int64_t fake_used() { return used_; }
int fake_error() { return failed_; }

int cudaMalloc(void** block, size_t size) { note("malloc", size, device_); return get(block, size); }
int cudaFree(void* block) { note("free", 0, 0); return give_back(block); }
int cudaMallocAsync(void** block, size_t size, void* stream) {
  note("mallocAsync", size, (uintptr_t)stream);
  return get(block, size);
}
int cudaFreeAsync(void* block, void* stream) { note("freeAsync", (uintptr_t)stream, device_); return give_back(block); }
int cudaGetDevice(int* device) { *device = device_; return 0; }
int cudaSetDevice(int device) { device_ = device; return 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) { *value = attribute == 115 ? pools_ : 0; return 0; }
int cudaDeviceGetDefaultMemPool(void** pool, int device) { *pool = (void*)(uintptr_t)(1 + device); return 0; }
int cudaMemPoolSetAttribute(void* pool, int attribute, void* value) {
  if (attribute == 4 && *(uint64_t*)value == UINT64_MAX) note("keep", (uintptr_t)pool, 0);
  return 0;
}
int cudaMemPoolTrimTo(void* pool, size_t) { note("trim", (uintptr_t)pool, 0); return 0; }
int cudaDeviceSynchronize() { note("synchronize", 0, 0); return 0; }
int cudaEventCreateWithFlags(void** event, unsigned) { *event = (void*)(uintptr_t)++events_; return 0; }
int cudaEventRecord(void*, void* stream) { note("record", (uintptr_t)stream, 0); return 0; }
int cudaEventDestroy(void*) { --events_; return 0; }
int cudaStreamWaitEvent(void* stream, void*, unsigned) { note("wait", (uintptr_t)stream, 0); return 0; }
int cudaGetLastError() { int error = failed_; failed_ = 0; return error; }
const char* cudaGetErrorString(int) { return "out of memory"; }
}

// torch catches what the allocator throws; ctypes cannot, so that the tests call through here.
#include <dlfcn.h>
#include <sys/types.h>

#include <exception>
static std::string thrown_;
extern "C" const char* fake_thrown() { return thrown_.c_str(); }
extern "C" void* fake_alloc(void* (*alloc)(ssize_t, int, void*), ssize_t size, int device, void* stream) {
  thrown_.clear();
  try {
    return alloc(size, device, stream);
  } catch (const std::exception& error) {
    thrown_ = error.what();
    return nullptr;
  }
}
