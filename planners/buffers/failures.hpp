// What the skyline search stands on: states known to have no solution, hashes, random numbers, budgets.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

using i32 = std::int32_t;
using i64 = std::int64_t;
using u64 = std::uint64_t;

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

// 1 1 2 1 1 2 4 1 1 2 ...: within a logarithm of the best restarting policy there is.
i64 luby(i64 i) {
    for (i64 power = 1;; power *= 2) {
        if (i == 2 * power - 2) return power;
        if (i < 2 * power - 2) return luby(i - power + 1);
    }
}

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

}  // namespace
