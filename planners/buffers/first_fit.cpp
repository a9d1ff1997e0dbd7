// Puts buffers down one after the other, each into the first or the smallest gap that takes it; see greedy.py.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using i32 = std::int32_t;
using i64 = std::int64_t;
constexpr i64 FAR = std::numeric_limits<i64>::max();

struct Placed {
    i32 lower, upper;
    i64 begin, end;
};

}  // namespace

// Fills offsets and returns the peak. Gaps are found by walking over what is placed from the lowest address upwards.
extern "C" i64 first_fit(i32 n, const i32* lower, const i32* upper, const i64* size, const i32* order, i32 best,
                         i64* offsets) {
    std::vector<Placed> placed;
    placed.reserve(n);
    i64 peak = 0;
    for (i32 k = 0; k < n; ++k) {
        const i32 i = order[k], from = lower[i], to = upper[i];
        i64 top = 0, at = -1, least = FAR;
        for (const Placed& other : placed) {
            if (other.lower >= to || other.upper <= from) continue;
            const i64 gap = other.begin - top;
            if (gap >= size[i] && gap < least) {
                at = top;
                least = gap;
                if (!best) break;
            }
            top = std::max(top, other.end);
        }
        if (at < 0) at = top;
        offsets[i] = at;
        peak = std::max(peak, at + size[i]);
        const Placed mine{from, to, at, at + size[i]};
        const auto after = [](i64 begin, const Placed& other) { return begin < other.begin; };
        placed.insert(std::upper_bound(placed.begin(), placed.end(), at, after), mine);
    }
    return peak;
}
