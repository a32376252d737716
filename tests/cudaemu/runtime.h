// What the two sides of the runner say to each other: kernels (compiled with kernel.h, or translated from PTX) call the
// functions at the end; the runtime (runtime.cpp) calls the kernel.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <utility>

struct uint3 {
    unsigned x, y, z;
};

namespace runner {

enum Fault { BARRIER = 1, RACE, WARP, BOUNDS, UNSET, ARITHMETIC, LAUNCH, TIME };  // the same numbers in launch.py
enum Kind { SHARED = 1, GLOBAL, CONSTANT };
enum Order { FORWARD, REVERSE, RANDOM };

struct Options {
    uint64_t first_block, last_block;  // those that run
    uint64_t seed;                     // of a random order
    uint32_t dynamic_shared;           // bytes
    int32_t order;                     // of threads and blocks
    int32_t check;                     // look at every load and store
    int32_t flush;                     // denormal numbers become zero
    int32_t seconds;                   // limit
    int32_t left_out;                  // number of the call that no thread makes, see switches.py
};

struct Region {  // memory that a kernel may touch
    uint64_t begin, end;
    int32_t kind;
    int32_t read_only;
    int32_t unset;  // holds nothing until it is written
    int32_t unused;
};

struct Builtins {
    uint3 thread, block, block_size, grid_size;
};

using Call = void (*)(void** arguments);
// What a warp does together: what each lane gives, and where each takes the result; null for lanes that stay away.
using Together = void (*)(const void* const* given, void* const* taken, int line);

// One product of a warpgroup: `columns` / 2 sums of this thread, and matrices in shared memory by their descriptors.
// The left one may be in registers. Rows lie there or columns, of the left one rows unless `left_columns`.
struct Product {
    float* sum;
    const unsigned* left_registers;
    uint64_t left, right;
    int columns, onto, half, rows, left_columns;
};

extern "C" {
extern Builtins builtins;
bool keeps(int number);
void block_barrier(int line);
int block_vote(int any, int line);
void together(Together work, const void* given, void* taken, unsigned mask, int line);
uint64_t exchange(uint64_t value, int source, unsigned mask, int line);
void warp_barrier(unsigned mask, int line);
void mma_bf16(const void* const* given, void* const* taken, int line);
void mma_f16(const void* const* given, void* const* taken, int line);
void mma_f64(const void* const* given, void* const* taken, int line);
void load_matrices(const void* const* given, void* const* taken, int line);
void load_transposed_matrices(const void* const* given, void* const* taken, int line);
void store_matrices(const void* const* given, void* const* taken, int line);
void store_transposed_matrices(const void* const* given, void* const* taken, int line);
void copy_later(void* to, const void* from, int bytes, int line);
void close_copies();
void finish_copies(int groups_left, int line);
char* dynamic_shared();
unsigned shared_address(const void* at);
void show_to_products();
void begin_products(int line);
void close_products();
void finish_products(int groups_left, int line);
void multiply_shared(const Product* product, int line);
void named_barrier(int number, int threads, int line);
void set_up(void* barrier, int arrivals, int line);
void arrive(void* barrier, int line);
void arrive_with_copies(void* barrier, int line);
void wait_for_phase(void* barrier, int phase, int line);
void note_read(const void* at, int bytes, int line);
void note_write(const void* at, int bytes, int line);
[[noreturn]] void fault(int kind, int line, const char* words);
int run_grid(Call call, void** arguments, const unsigned* grid, const unsigned* block, const Options* options,
             const Region* regions, int count, char* message, int length);
}

// Calls a kernel with the arguments that lie at the addresses given.
template <class... A, size_t... I>
__attribute__((no_sanitize("thread"))) void apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
}
template <class... A>
void apply(void (*kernel)(A...), void** arguments) {
    apply(kernel, arguments, std::index_sequence_for<A...>());
}

}  // namespace runner

// Static shared memory and constant tables each lie in a section of their own, whose ends the linker knows.
extern "C" {
extern char __start_runner_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_runner_shared[] __attribute__((weak, visibility("hidden")));
extern char __start_runner_constant[] __attribute__((weak, visibility("hidden")));
extern char __stop_runner_constant[] __attribute__((weak, visibility("hidden")));
}

// What Python loads from the library of one kernel.
#define RUNNER_EXPORT(kernel)                                                                                    \
    static void runner_call(void** arguments) { runner::apply(&kernel, arguments); }                            \
    extern "C" __attribute__((visibility("default"))) int runner_launch(                                        \
        void** arguments, const unsigned* grid, const unsigned* block, const runner::Options* options,          \
        const runner::Region* regions, int count, char* message, int length) {                                  \
        return runner::run_grid(&runner_call, arguments, grid, block, options, regions, count, message, length); \
    }
