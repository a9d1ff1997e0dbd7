// A wall clock that is wrong, for one process: put before libc by LD_PRELOAD, it shifts what the process is told of the
// time of day. Time since boot is left alone, as it is where somebody sets a machine's clock.
//
//      process ──► clock_gettime(CLOCK_REALTIME) ──► libc, and the offset is added
//      process ──► sem_timedwait(until)          ──► the offset is taken away, and libc: the kernel has the right time
//
// Functions that wait until a time of day get it back as the kernel knows it, so that a wait lasts as long as it would
// if the whole machine were wrong. A time that is not of day (since boot) is known by its smallness. Timers
// (timer_settime, timerfd_settime), message queues (mq_timedsend, mq_timedreceive) and whoever asks the kernel itself
// (futex) are not seen: there a wait until a time of day is wrong by the offset.

#include <atomic>
#include <cstdint>
#include <ctime>
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/time.h>

namespace {

constexpr int64_t kSecond = 1'000'000'000;
constexpr int64_t kDayTimes = 250'000'000;  // seconds: later than any time since boot, earlier than any time of day
constexpr int64_t kFarAway = int64_t{1} << 33;  // seconds: who waits until then waits for ever

std::atomic<int64_t> offset_ns{0};
std::atomic<int64_t> until_ns{0};  // since boot; 0: for good

// A function of libc, looked up when this library is loaded (`look_up`), and if it is called before that, then: whoever
// holds a lock may not wait for the loader's, and what the loader says of a failure is for somebody else. Nothing here
// needs the C++ library: every process of the job loads this file first, and some bring a newer one along.
template <typename F>
class Libc {
  public:
    constexpr explicit Libc(const char* name, const char* version = nullptr) : name_(name), version_(version) {}

    F get() {
        void* found = found_.load(std::memory_order_acquire);
        if (found) return reinterpret_cast<F>(found);
        if (version_) found = dlvsym(RTLD_NEXT, name_, version_);
        if (!found) found = dlsym(RTLD_NEXT, name_);
        found_.store(found, std::memory_order_release);
        return reinterpret_cast<F>(found);
    }

  private:
    const char* name_;
    const char* version_;
    std::atomic<void*> found_{nullptr};
};

Libc<int (*)(clockid_t, timespec*)> libc_gettime("clock_gettime");
Libc<int (*)(timeval*, void*)> libc_gettimeofday("gettimeofday");
Libc<int (*)(timespec*, int)> libc_timespec_get("timespec_get");
Libc<int (*)(pthread_cond_t*, pthread_mutex_t*, const timespec*)> libc_cond_timedwait(
    "pthread_cond_timedwait", "GLIBC_2.3.2");  // not the older one of x86-64
Libc<int (*)(pthread_cond_t*, pthread_mutex_t*, clockid_t, const timespec*)> libc_cond_clockwait(
    "pthread_cond_clockwait");
Libc<int (*)(pthread_mutex_t*, const timespec*)> libc_mutex_timedlock("pthread_mutex_timedlock");
Libc<int (*)(pthread_mutex_t*, clockid_t, const timespec*)> libc_mutex_clocklock("pthread_mutex_clocklock");
Libc<int (*)(pthread_rwlock_t*, const timespec*)> libc_rwlock_timedrdlock("pthread_rwlock_timedrdlock");
Libc<int (*)(pthread_rwlock_t*, const timespec*)> libc_rwlock_timedwrlock("pthread_rwlock_timedwrlock");
Libc<int (*)(pthread_rwlock_t*, clockid_t, const timespec*)> libc_rwlock_clockrdlock("pthread_rwlock_clockrdlock");
Libc<int (*)(pthread_rwlock_t*, clockid_t, const timespec*)> libc_rwlock_clockwrlock("pthread_rwlock_clockwrlock");
Libc<int (*)(sem_t*, const timespec*)> libc_sem_timedwait("sem_timedwait");
Libc<int (*)(sem_t*, clockid_t, const timespec*)> libc_sem_clockwait("sem_clockwait");
Libc<int (*)(clockid_t, int, const timespec*, timespec*)> libc_nanosleep("clock_nanosleep");

__attribute__((constructor)) void look_up() {
    libc_gettime.get();
    libc_gettimeofday.get();
    libc_timespec_get.get();
    libc_cond_timedwait.get();
    libc_cond_clockwait.get();
    libc_mutex_timedlock.get();
    libc_mutex_clocklock.get();
    libc_rwlock_timedrdlock.get();
    libc_rwlock_timedwrlock.get();
    libc_rwlock_clockrdlock.get();
    libc_rwlock_clockwrlock.get();
    libc_sem_timedwait.get();
    libc_sem_clockwait.get();
    libc_nanosleep.get();
    dlerror();  // of what an older libc lacks
}

int64_t offset() {
    const int64_t shift = offset_ns.load(std::memory_order_acquire);
    const int64_t until = until_ns.load(std::memory_order_acquire);
    if (shift == 0 || until == 0) return shift;
    timespec now;
    libc_gettime.get()(CLOCK_MONOTONIC, &now);
    return now.tv_sec * kSecond + now.tv_nsec < until ? shift : 0;
}

timespec shifted(const timespec& time, int64_t by_ns) {
    int64_t seconds = time.tv_sec + by_ns / kSecond;
    int64_t nanoseconds = time.tv_nsec + by_ns % kSecond;
    if (nanoseconds < 0) nanoseconds += kSecond, --seconds;
    if (nanoseconds >= kSecond) nanoseconds -= kSecond, ++seconds;
    return {static_cast<time_t>(seconds), static_cast<long>(nanoseconds)};
}

// A time until which somebody wants to wait, as the kernel counts.
timespec kernels(const timespec* until) {
    const bool is_of_day = until->tv_sec >= kDayTimes && until->tv_sec < kFarAway;
    const bool is_valid = until->tv_nsec >= 0 && until->tv_nsec < kSecond;
    return is_of_day && is_valid ? shifted(*until, -offset()) : *until;
}

}  // namespace

extern "C" {

// From now on, and until a time since boot (0: for good). The clock is right while it changes: nobody must find what
// was until some time together with what is for good.
void distrain_skew(int64_t by_ns, int64_t until) {
    offset_ns.store(0, std::memory_order_release);
    until_ns.store(until, std::memory_order_release);
    offset_ns.store(by_ns, std::memory_order_release);
}

int clock_gettime(clockid_t clock, timespec* now) {
    const int code = libc_gettime.get()(clock, now);
    if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) *now = shifted(*now, offset());
    return code;
}

int gettimeofday(timeval* now, void* zone) {
    const int code = libc_gettimeofday.get()(now, zone);
    timeval* volatile given = now;  // declared as never null, which callers do not heed
    if (code == 0 && given) {
        const timespec wrong = shifted({now->tv_sec, now->tv_usec * 1000}, offset());
        now->tv_sec = wrong.tv_sec;
        now->tv_usec = wrong.tv_nsec / 1000;
    }
    return code;
}

time_t time(time_t* where) {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}

int timespec_get(timespec* now, int base) {
    if (base != TIME_UTC) return libc_timespec_get.get()(now, base);
    return clock_gettime(CLOCK_REALTIME, now) == 0 ? base : 0;
}

int pthread_cond_timedwait(pthread_cond_t* cond, pthread_mutex_t* mutex, const timespec* until) {
    const timespec right = kernels(until);
    return libc_cond_timedwait.get()(cond, mutex, &right);
}

int pthread_cond_clockwait(pthread_cond_t* cond, pthread_mutex_t* mutex, clockid_t clock, const timespec* until) {
    const timespec right = kernels(until);
    return libc_cond_clockwait.get()(cond, mutex, clock, &right);
}

int pthread_mutex_timedlock(pthread_mutex_t* mutex, const timespec* until) {
    const timespec right = kernels(until);
    return libc_mutex_timedlock.get()(mutex, &right);
}

int pthread_mutex_clocklock(pthread_mutex_t* mutex, clockid_t clock, const timespec* until) {
    const timespec right = kernels(until);
    return libc_mutex_clocklock.get()(mutex, clock, &right);
}

int pthread_rwlock_timedrdlock(pthread_rwlock_t* lock, const timespec* until) {
    const timespec right = kernels(until);
    return libc_rwlock_timedrdlock.get()(lock, &right);
}

int pthread_rwlock_timedwrlock(pthread_rwlock_t* lock, const timespec* until) {
    const timespec right = kernels(until);
    return libc_rwlock_timedwrlock.get()(lock, &right);
}

int pthread_rwlock_clockrdlock(pthread_rwlock_t* lock, clockid_t clock, const timespec* until) {
    const timespec right = kernels(until);
    return libc_rwlock_clockrdlock.get()(lock, clock, &right);
}

int pthread_rwlock_clockwrlock(pthread_rwlock_t* lock, clockid_t clock, const timespec* until) {
    const timespec right = kernels(until);
    return libc_rwlock_clockwrlock.get()(lock, clock, &right);
}

int sem_timedwait(sem_t* semaphore, const timespec* until) {
    const timespec right = kernels(until);
    return libc_sem_timedwait.get()(semaphore, &right);
}

int sem_clockwait(sem_t* semaphore, clockid_t clock, const timespec* until) {
    const timespec right = kernels(until);
    return libc_sem_clockwait.get()(semaphore, clock, &right);
}

int clock_nanosleep(clockid_t clock, int flags, const timespec* until, timespec* left) {
    const timespec right = (flags & TIMER_ABSTIME) ? kernels(until) : *until;
    return libc_nanosleep.get()(clock, flags, &right, left);
}

}  // extern "C"
