// What translated PTX is written in: registers are variables, every operand is read as the type its instruction names.
#pragma once
#include "runtime.h"

#include <type_traits>

#define RUNNER_CONSTANT alignas(16) static __attribute__((section("runner_constant"), used))

// A register read as another type: numbers of one kind are converted, other bits are kept.
template <class To, class From>
static inline To as(From x) {
    if constexpr (std::is_integral_v<To> && std::is_integral_v<From>) {
        return To(x);
    } else if constexpr (std::is_same_v<To, From>) {
        return x;
    } else {
        using Bits = std::conditional_t<sizeof(To) == 8, uint64_t, uint32_t>;
        Bits bits = 0;
        if constexpr (std::is_integral_v<From>)
            bits = Bits(x);
        else
            memcpy(&bits, &x, sizeof x);
        To y;
        memcpy(&y, &bits, sizeof y);
        return y;
    }
}
template <class To, class From>
static inline void set(To& register_, From x) {
    register_ = as<To>(x);
}

static inline uint64_t shared_memory() { return uint64_t(runner::dynamic_shared()); }
template <class T>
static inline T load(uint64_t at, int line) {
    runner::note_read(reinterpret_cast<void*>(at), sizeof(T), line);
    T x;
    memcpy(&x, reinterpret_cast<void*>(at), sizeof x);
    return x;
}
template <class T>
static inline void store(uint64_t at, T x, int line) {
    runner::note_write(reinterpret_cast<void*>(at), sizeof(T), line);
    memcpy(reinterpret_cast<void*>(at), &x, sizeof x);
}

template <class T>
static inline T shift_left(T x, uint32_t bits) {
    return bits >= sizeof(T) * 8 ? T(0) : T(x << bits);
}
template <class T>
static inline T shift_right(T x, uint32_t bits) {
    return bits >= sizeof(T) * 8 ? T(x < 0 ? -1 : 0) : T(x >> bits);
}
template <class T>
static inline T with_bits(T x, T into, uint32_t at, uint32_t bits) {
    const T mask = shift_left(T(shift_left(T(1), bits) - 1), at);
    return (shift_left(x, at) & mask) | (into & ~mask);
}
template <class T>
static inline auto wide(T x) {
    if constexpr (std::is_signed_v<T>)
        return std::conditional_t<sizeof(T) == 2, int32_t, int64_t>(x);
    else
        return std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>(x);
}
template <class T>
static inline T high_product(T x, T y) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return T((Wide(x) * Wide(y)) >> (sizeof(T) * 8));
}
template <class T>
static inline T divisor(T x, int line) {
    if (!x) runner::fault(runner::ARITHMETIC, line, "integer division by zero");
    return x;
}
template <class T>
static inline T least(T x, T y) {
    if constexpr (std::is_floating_point_v<T>)
        return T(fmin(x, y));
    else
        return x < y ? x : y;
}
template <class T>
static inline T largest(T x, T y) {
    if constexpr (std::is_floating_point_v<T>)
        return T(fmax(x, y));
    else
        return x < y ? y : x;
}
// A number from 0 to 1; NaN is 0.
template <class F>
static inline F saturated(F x) {
    return x > 0 ? x < 1 ? x : F(1) : F(0);
}
// A float as an integer: NaN is 0, what does not fit is the nearest that does.
template <class I, class F>
static inline I whole(F x) {
    constexpr int bits = sizeof(I) * 8 - std::is_signed_v<I>;
    const double end = ldexp(1.0, bits), begin = std::is_signed_v<I> ? -end : 0.0;
    if (x != x) return 0;
    if (double(x) >= end) return I(~(std::is_signed_v<I> ? I(1) << (sizeof(I) * 8 - 1) : I(0)));
    return double(x) <= begin ? I(std::is_signed_v<I> ? I(1) << (sizeof(I) * 8 - 1) : I(0)) : I(x);
}
static inline uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t choice) {
    const uint64_t all = uint64_t(high) << 32 | low;
    uint32_t made = 0;
    for (int i = 0; i < 4; i++) made |= uint32_t(all >> (8 * (choice >> (4 * i) & 7)) & 255) << (8 * i);
    return made;
}
static inline uint32_t funnel(uint32_t low, uint32_t high, uint32_t bits, bool left) {
    const uint64_t all = uint64_t(high) << 32 | low;
    return left ? uint32_t((all << bits) >> 32) : uint32_t(all >> bits);
}
static inline uint32_t shuffle(uint32_t value, uint32_t distance, uint32_t mask, int line) {
    return uint32_t(runner::exchange(value, int(runner::builtins.thread.x % 32 ^ distance), mask, line));
}

// What NVIDIA's sin and cos ask of a large angle: x = quadrant pi / 2 + rest.
static inline void r___internal_trig_reduction_slowpathd(char* result, char* angle) {
    const double x = *reinterpret_cast<double*>(angle), half_pi = 1.57079632679489661923;
    const double turned = atan2(sin(x), cos(x)), quadrant = nearbyint(turned / half_pi);
    *reinterpret_cast<double*>(result) = turned - quadrant * half_pi;
    *reinterpret_cast<int32_t*>(result + 8) = int32_t(quadrant);
}
