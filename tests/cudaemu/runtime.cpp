// The runtime: threads of a block as fibers, a scheduler that sees deadlock and divergence, and (in check mode) a look
// at every load and store. g++ calls the hooks at the end because of -fsanitize=thread and undefined; its own libraries
// behind these options are not linked.
#include "runtime.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <map>
#include <numeric>
#include <random>
#include <unordered_map>
#include <vector>

using namespace runner;

namespace {

constexpr size_t STACK = 256 * 1024;  // bytes of one thread, the lowest page of them guarded
constexpr size_t PAGE = 4096;
constexpr uint32_t SEVERAL = UINT32_MAX;  // threads, or blocks
constexpr uint32_t OF_ONE_WARP = 1u << 31;  // several threads, all of the warp that is named in the other bits

enum State { READY, AT_BARRIER, IN_EXCHANGE, AT_NAMED, IN_PHASE, DONE };
constexpr int WARPS = 32;                // of a block, at most
constexpr unsigned SHARED_BEGIN = 1024;  // shared address of dynamic shared memory
using Clock = std::vector<uint32_t>;     // for each thread: what is known to have happened, in its own count
using Ended = std::map<const void*, uint32_t>;  // of barriers, how many phases are known to have ended

struct Copy {  // one that the program does not wait for
    void* to;
    unsigned char bytes[16];
    int group, line;
};

struct Sums {  // of products under way; the registers themselves hold NaN
    float* registers;
    std::vector<float> values;
    int group;
};
struct Lefts {  // registers of a left matrix, which nobody may change
    const unsigned* registers;
    int group;
};

struct Thread {
    void* stack;
    uint3 index;
    int number, warp, lane;
    State state;
    int line;  // where it waits
    Together work;  // what it does with its warp
    const void* given;
    void* taken;
    unsigned mask;
    std::vector<Copy> copies;  // under way
    int group;                 // of copies, the one that is open
    Clock clock;               // only where barriers have phases
    uint32_t epoch;            // its own count in it
    Ended known;               // what it has waited for itself
    uint32_t shown;            // when it last showed to products what was written
    Ended shown_known;         // and what it knew then
    bool may_multiply;
    std::vector<Sums> sums;
    std::vector<Lefts> lefts;
    const void* awaited;  // a barrier with phases, or the number of one that has a name
    int named;
};

struct Flight {  // 16 bytes that a product reads
    size_t place;
    int group;
};

struct Warp {
    unsigned alive, arrived;  // one bit per lane
    uint32_t interval;        // how many barriers of the warp came before
    int group;                // of products, the one that is open
    std::vector<Flight> flights;
};

struct Access {  // the last one of its kind to a byte; block 0: none yet
    uint32_t block, thread, interval, warp_interval;  // intervals: how many barriers came before
    uint32_t epoch;                                   // in the count of the thread, see Clock
};

struct Readers {  // of one byte since its last write: the last access of each thread, by its number
    std::bitset<32 * WARPS> who;
    std::vector<Access> accesses;
};

struct Cell {  // what is known of one byte
    Access write, read;
    bool set, under_way;  // a copy will write it at some time
    uint8_t alike;        // so many bytes from here on are like it, and their own cells say nothing; see part
    uint8_t padding;      // cells are compared as bytes
    uint32_t time;        // of the write, see Thread::shown
};

struct Use {  // of 16 bytes by products: those under way, and for each warp when the last one ended
    const void* barrier;  // with phases, which the copy that has written them told, and in which phase
    uint32_t phase;
    int under_way;
    std::array<std::pair<uint32_t, uint32_t>, WARPS> ends;  // interval, and epoch of the warp's first lane
};

struct Shadow {
    Region region;
    Cell* cells;            // none where the memory is too large to follow
    std::vector<Use> uses;  // of dynamic shared memory
};

struct Phases {  // a barrier in shared memory that counts arrivals
    int arrivals, pending;
    uint32_t phase;
    Clock gathered, known;  // of those who have arrived; at the end of the last phase
};

struct Arrival {  // one that comes with copies
    int thread;
    void* barrier;
    std::vector<Copy> copies;
    Clock clock;
    int line;
};

struct Machine {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Shadow> memory;
    std::unordered_map<const Cell*, Readers> readers;  // since the last write, see remember_reader
    std::vector<int> order;
    std::mt19937_64 chance;
    Options options;
    Call call;
    void** arguments;
    char* stacks = nullptr;
    size_t stack_count = 0;
    char* shared = nullptr;
    size_t shared_size = 0;
    Thread* current = nullptr;
    void* scheduler = nullptr;  // stack pointer
    int live, exited;
    bool votes, vote;  // of the next barrier, of the last one
    uint32_t block, interval;
    std::map<const void*, Phases> phases;
    std::vector<Arrival> coming;
    uint32_t time;
    int code;
    char* message;
    int length;
    sigjmp_buf escape;
} machine;

}  // namespace

extern "C" {
__attribute__((visibility("hidden"))) Builtins runner::builtins;

// Saves one stack pointer and goes on at another.
__attribute__((visibility("hidden"))) void switch_stack(void** save, void* to);
}
asm(R"(
.text
.globl switch_stack
.hidden switch_stack
.type switch_stack,@function
switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp,(%rdi)
    movq %rsi,%rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// ---- faults -------------------------------------------------------------------------------------------------------

static int say(int at, const char* format, ...) {
    va_list words;
    va_start(words, format);
    const int written = vsnprintf(machine.message + at, size_t(std::max(machine.length - at, 0)), format, words);
    va_end(words);
    return std::min(at + written, machine.length - 1);
}

static int say_where(int at, int line) {
    if (line) at = say(at, " at line %d", line);
    at = say(at, " [block (%u, %u, %u)", builtins.block.x, builtins.block.y, builtins.block.z);
    if (!machine.current) return say(at, "]");
    return say(at, ", thread (%u, %u, %u)]", builtins.thread.x, builtins.thread.y, builtins.thread.z);
}

void runner::fault(int kind, int line, const char* words) {
    machine.code = kind;
    say_where(say(0, "%s", words), line);
    siglongjmp(machine.escape, 1);
}

// How many threads wait at which line.
static void fault_of_waiting(const char* words) {
    machine.code = BARRIER;
    int at = say(0, "%s:", words);
    std::vector<std::pair<State, int>> seen;
    for (const Thread& one : machine.threads) {
        const std::pair<State, int> place(one.state, one.state == DONE ? 0 : one.line);
        if (std::count(seen.begin(), seen.end(), place)) continue;
        seen.push_back(place);
        const long many = std::count_if(machine.threads.begin(), machine.threads.end(), [&](const Thread& other) {
            return other.state == place.first && (other.state == DONE || other.line == place.second);
        });
        const char* doing = place.first == DONE         ? "exited"
                            : place.first == IN_EXCHANGE ? "in a shuffle"
                            : place.first == IN_PHASE    ? "waiting for a phase"
                                                         : "at a barrier";
        at = say(at, "%s %ld %s", seen.size() > 1 ? "," : "", many, doing);
        if (place.first != DONE) at = say(at, " (line %d)", place.second);
    }
    say_where(at, 0);
    siglongjmp(machine.escape, 1);
}

static void on_signal(int number) {
    machine.code = number == SIGVTALRM ? TIME : number == SIGFPE ? ARITHMETIC : BOUNDS;
    const char* words = number == SIGVTALRM ? "time limit: an endless loop?"
                        : number == SIGFPE  ? "integer division by zero"
                                            : "wild memory access or stack overflow";
    say_where(say(0, "%s", words), 0);
    siglongjmp(machine.escape, 1);
}

// ---- threads ------------------------------------------------------------------------------------------------------

static void leave(State state, int line) {
    machine.current->state = state;
    machine.current->line = line;
    switch_stack(&machine.current->stack, machine.scheduler);
}

static void life_of_a_thread() {
    machine.call(machine.arguments);
    Thread& self = *machine.current;
    if (!self.copies.empty()) fault(RACE, self.copies[0].line, "a copy that nobody waits for");
    if (!self.sums.empty()) fault(RACE, 0, "a product that nobody waits for");
    for (const Arrival& arrival : machine.coming)
        if (arrival.thread == self.number) fault(RACE, arrival.line, "a thread ends before its copies are there");
    machine.live--, machine.exited++;
    Warp& warp = machine.warps[size_t(self.warp)];
    warp.alive &= ~(1u << self.lane);
    Thread* lanes = &machine.threads[size_t(self.warp) * 32];
    for (int i = 0; i < 32; i++)
        if ((warp.arrived >> i & 1) && (lanes[i].mask >> self.lane & 1))
            fault(WARP, lanes[i].line, "a lane has exited that others wait for in a shuffle");
    leave(DONE, 0);
}

static void prepare(Thread& thread) {
    thread.state = READY;
    thread.copies.clear(), thread.group = 0;
    thread.epoch = 0, thread.clock.clear(), thread.known.clear(), thread.shown_known.clear();
    thread.sums.clear(), thread.lefts.clear();
    thread.shown = 0, thread.may_multiply = false;
    char* top = machine.stacks + size_t(thread.number + 1) * STACK;
    top -= thread.number % 61 * 320;  // equal places in all stacks would share one set of the cache
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;
    *--at = reinterpret_cast<void*>(&life_of_a_thread);
    thread.stack = at - 6;  // six registers that switch_stack takes back
}

static void resume(Thread& thread) {
    machine.current = &thread;
    builtins.thread = thread.index;
    switch_stack(&machine.scheduler, thread.stack);
    machine.current = nullptr;
}

bool runner::keeps(int number) { return number != machine.options.left_out; }

void runner::block_barrier(int line) { leave(AT_BARRIER, line); }

// A barrier that tells every thread whether any of them said so.
int runner::block_vote(int any, int line) {
    machine.votes |= any != 0;
    leave(AT_BARRIER, line);
    return machine.vote;
}

char* runner::dynamic_shared() { return machine.shared; }

// ---- who knows what, where barriers do not stop all threads ---------------------------------------------------------
//
// Of loads, stores and products a thread knows by its clock: it has heard from those who made them. That does not tell
// of copies which arrive at a barrier, because the other has only begun them. To read these by a product, a thread
// waits for their phase itself, and it shows them after that, unless who has begun them has waited and shown them.

static void learn(Clock& clock, const Clock& other) {
    clock.resize(machine.threads.size());
    for (size_t i = 0; i < other.size(); i++) clock[i] = std::max(clock[i], other[i]);
}
// The own count of a thread goes on when it has told others.
static void go_on(Thread& thread) {
    thread.clock.resize(machine.threads.size());
    thread.clock[size_t(thread.number)] = ++thread.epoch;
}
static bool knows(const Thread& thread, uint32_t other, uint32_t epoch) {
    return other < thread.clock.size() && thread.clock[other] >= epoch + 1;
}
template <class Which>
static void tell_each_other(Which which) {
    Clock all;
    for (Thread& thread : machine.threads)
        if (which(thread)) go_on(thread), learn(all, thread.clock);
    for (Thread& thread : machine.threads)
        if (which(thread)) learn(thread.clock, all);
}

// ---- what the lanes of a warp do together ---------------------------------------------------------------------------

static void finish_together(Warp& warp, Thread* lanes, unsigned mask);

void runner::together(Together work, const void* given, void* taken, unsigned mask, int line) {
    Thread& self = *machine.current;
    Warp& warp = machine.warps[size_t(self.warp)];
    if (!(mask >> self.lane & 1)) fault(WARP, line, "a thread shuffles with a mask that does not name it");
    self.work = work, self.given = given, self.taken = taken, self.mask = mask, self.line = line;
    warp.arrived |= 1u << self.lane;
    self.state = IN_EXCHANGE;
    finish_together(warp, &machine.threads[size_t(self.warp) * 32], mask);
    if (self.state == IN_EXCHANGE) leave(IN_EXCHANGE, line);
}

// The last lane to arrive works for all.
static void finish_together(Warp& warp, Thread* lanes, unsigned mask) {
    if (mask & ~warp.alive) fault(WARP, machine.current->line, "a shuffle names lanes that do not exist or have exited");
    if ((warp.arrived & mask) != mask) return;
    const Thread& last = *machine.current;
    const void* given[32] = {};
    void* taken[32] = {};
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1)) continue;
        if (lanes[i].mask != mask) fault(WARP, last.line, "lanes of one warp shuffle with different masks");
        if (lanes[i].line != last.line || lanes[i].work != last.work)
            fault(WARP, last.line, "lanes of one warp meet in different shuffles");
        given[i] = lanes[i].given, taken[i] = lanes[i].taken;
    }
    last.work(given, taken, last.line);
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) lanes[i].state = READY;
    warp.arrived &= ~mask;
}

struct Exchanged {
    uint64_t value;
    int source;
};

static void shuffle(const void* const* given, void* const* taken, int line) {
    for (int i = 0; i < 32; i++) {
        if (!given[i]) continue;
        const void* from = given[static_cast<const Exchanged*>(given[i])->source & 31];
        if (!from) fault(WARP, line, "a shuffle reads a lane that takes no part");
        *static_cast<uint64_t*>(taken[i]) = static_cast<const Exchanged*>(from)->value;
    }
}

uint64_t runner::exchange(uint64_t value, int source, unsigned mask, int line) {
    const Exchanged given = {value, source};
    together(shuffle, &given, &value, mask, line);
    return value;
}

static void meet(const void* const*, void* const*, int) {
    const int warp = machine.current->warp;
    machine.warps[size_t(warp)].interval++;
    if (!machine.phases.empty()) tell_each_other([&](const Thread& thread) { return thread.warp == warp; });
}

// Orders what lanes of the whole warp did before it and do after it; a part of a warp is not ordered.
void runner::warp_barrier(unsigned mask, int line) {
    static const char nothing = 0;
    together(meet, &nothing, nullptr, mask, line);
}

// ---- matrices of a warp, as the PTX manual lays them out in registers -------------------------------------------------

static float number(unsigned bits, bool half) {
    const uint16_t short_bits = uint16_t(bits);
    float x;
    if (half) {
        _Float16 y;
        memcpy(&y, &short_bits, 2);
        return float(y);
    }
    bits = unsigned(short_bits) << 16;
    memcpy(&x, &bits, 4);
    return x;
}

// A sum as tensor cores make it: all terms are cut at the same bit, two below the last one of the largest as a float,
// and the sum is cut, not rounded. Real ones are said to be at least as good.
static float added(const double* terms, int count) {
    double largest = 0, plain = 0;
    for (int i = 0; i < count; i++) largest = std::max(largest, fabs(terms[i])), plain += terms[i];
    if (!(fabs(plain) < INFINITY) || largest == 0) return float(plain);
    uint64_t power;
    memcpy(&power, &largest, sizeof power);
    power &= 0x7ffull << 52;  // of two, the largest one in it
    double down;
    memcpy(&down, &power, sizeof down);
    down *= 0x1p-25;
    const double up = 1 / down;
    double sum = 0;
    for (int i = 0; i < count; i++) sum += trunc(terms[i] * up);
    sum *= down;
    const float rounded = float(sum);
    return fabs(double(rounded)) > fabs(sum) && rounded - rounded == 0 ? nextafterf(rounded, 0) : rounded;
}

struct Factors {
    unsigned a[4], b[2];
    float sum[4];
};

static void multiply(const void* const* given, void* const* taken, bool half) {
    float a[16][16], b[8][16];
    for (int lane = 0; lane < 32; lane++) {
        const Factors& mine = *static_cast<const Factors*>(given[lane]);
        const int line = lane / 4, pair = lane % 4 * 2;
        for (int j = 0; j < 2; j++) {
            for (int i = 0; i < 4; i++) a[line + i % 2 * 8][pair + i / 2 * 8 + j] = number(mine.a[i] >> 16 * j, half);
            for (int i = 0; i < 2; i++) b[line][pair + i * 8 + j] = number(mine.b[i] >> 16 * j, half);
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        const Factors& mine = *static_cast<const Factors*>(given[lane]);
        for (int i = 0; i < 4; i++) {
            const float *left = a[lane / 4 + i / 2 * 8], *right = b[lane % 4 * 2 + i % 2];
            double terms[17];
            for (int k = 0; k < 16; k++) terms[k] = double(left[k]) * right[k];
            terms[16] = mine.sum[i];
            static_cast<float*>(taken[lane])[i] = added(terms, 17);
        }
    }
}

void runner::mma_bf16(const void* const* given, void* const* taken, int) { multiply(given, taken, false); }
void runner::mma_f16(const void* const* given, void* const* taken, int) { multiply(given, taken, true); }

struct DoubleFactors {
    double a[4], b[2], sum[4];
};

// 16 x 8 times 8 x 8 of doubles; each product and sum is rounded once, as fma.
void runner::mma_f64(const void* const* given, void* const* taken, int) {
    double a[16][8], b[8][8];
    for (int lane = 0; lane < 32; lane++) {
        const DoubleFactors& mine = *static_cast<const DoubleFactors*>(given[lane]);
        for (int i = 0; i < 4; i++) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = mine.a[i];
        for (int i = 0; i < 2; i++) b[lane % 4 + i * 4][lane / 4] = mine.b[i];
    }
    for (int lane = 0; lane < 32; lane++) {
        const DoubleFactors& mine = *static_cast<const DoubleFactors*>(given[lane]);
        for (int i = 0; i < 4; i++) {
            double sum = mine.sum[i];
            for (int k = 0; k < 8; k++) sum = fma(a[lane / 4 + i / 2 * 8][k], b[k][lane % 4 * 2 + i % 2], sum);
            static_cast<double*>(taken[lane])[i] = sum;
        }
    }
}

// Four matrices of 8 x 8: lane i gives the address of row i % 8 of matrix i / 8.
static void load(const void* const* given, void* const* taken, bool transposed) {
    for (int lane = 0; lane < 32; lane++)
        for (int matrix = 0; matrix < 4; matrix++) {
            unsigned both = 0;
            for (int j = 0; j < 2; j++) {
                const int line = lane / 4, pair = lane % 4 * 2 + j;
                const uint16_t* row = static_cast<const uint16_t*>(given[matrix * 8 + (transposed ? pair : line)]);
                both |= unsigned(row[transposed ? line : pair]) << 16 * j;
            }
            static_cast<unsigned*>(taken[lane])[matrix] = both;
        }
}

void runner::load_matrices(const void* const* given, void* const* taken, int) { load(given, taken, false); }
void runner::load_transposed_matrices(const void* const* given, void* const* taken, int) { load(given, taken, true); }

// The same four matrices, back to their rows.
static void store(const void* const* given, void* const* taken, bool transposed) {
    for (int lane = 0; lane < 32; lane++)
        for (int matrix = 0; matrix < 4; matrix++)
            for (int j = 0; j < 2; j++) {
                const int line = lane / 4, pair = lane % 4 * 2 + j;
                uint16_t* row = static_cast<uint16_t*>(taken[matrix * 8 + (transposed ? pair : line)]);
                row[transposed ? line : pair] = uint16_t(static_cast<const unsigned*>(given[lane])[matrix] >> 16 * j);
            }
}

void runner::store_matrices(const void* const* given, void* const* taken, int) { store(given, taken, false); }
void runner::store_transposed_matrices(const void* const* given, void* const* taken, int) { store(given, taken, true); }

// ---- the scheduler ------------------------------------------------------------------------------------------------

static void forget(Shadow& shadow) {
    if (!shadow.cells) return;
    const size_t bytes = size_t(shadow.region.end - shadow.region.begin);
    std::fill(shadow.cells, shadow.cells + bytes, Cell{});
    std::fill(shadow.uses.begin(), shadow.uses.end(), Use{});
}

static void begin_block(uint64_t number, const unsigned* grid) {
    machine.block = uint32_t(number - machine.options.first_block + 1);
    machine.interval++;
    builtins.block = {unsigned(number % grid[0]), unsigned(number / grid[0] % grid[1]),
                      unsigned(number / (uint64_t(grid[0]) * grid[1]))};
    for (Shadow& shadow : machine.memory) {
        if (shadow.region.kind != SHARED) continue;
        memset(reinterpret_cast<void*>(shadow.region.begin), 0xFF, shadow.region.end - shadow.region.begin);
        forget(shadow);
    }
    machine.live = int(machine.threads.size()), machine.exited = 0, machine.votes = false;
    machine.phases.clear(), machine.readers.clear(), machine.coming.clear(), machine.time = 1;
    for (size_t i = 0; i < machine.warps.size(); i++) {
        const size_t lanes = std::min<size_t>(machine.threads.size() - i * 32, 32);
        machine.warps[i] = {lanes < 32 ? (1u << lanes) - 1 : UINT32_MAX, 0, 0, 0, {}};
    }
    for (Thread& thread : machine.threads) prepare(thread);
}

// Every thread as far as it gets without the others.
static void run_ready_threads() {
    for (bool any = true; any;) {
        any = false;
        if (machine.options.order == RANDOM) std::shuffle(machine.order.begin(), machine.order.end(), machine.chance);
        for (const int i : machine.order) {
            if (machine.threads[size_t(i)].state != READY) continue;
            resume(machine.threads[size_t(i)]);
            any = true;
        }
    }
}

static void open_barrier() {
    int line = 0;
    for (const Thread& thread : machine.threads) {
        if (thread.state != AT_BARRIER && thread.state != DONE) fault_of_waiting("deadlock");
        if (thread.state != AT_BARRIER) continue;
        if (line && thread.line != line) fault_of_waiting("divergent barrier");
        line = thread.line;
    }
    if (machine.exited) fault_of_waiting("divergent barrier");
    machine.interval++;
    machine.vote = machine.votes, machine.votes = false;
    for (Thread& thread : machine.threads) thread.state = READY;
}

static bool land_copies();

static void run_block() {
    while (run_ready_threads(), machine.live)
        if (!land_copies()) open_barrier();
}

static void run_blocks(const unsigned* grid) {
    const uint64_t all = uint64_t(grid[0]) * grid[1] * grid[2];
    const uint64_t first = machine.options.first_block;
    const uint64_t last = std::min(machine.options.last_block ? machine.options.last_block : all, all);
    for (uint64_t i = first; i < last; i++) {
        begin_block(machine.options.order == REVERSE ? last - 1 - (i - first) : i, grid);
        run_block();
    }
}

static bool refused(const unsigned* grid, const unsigned* block) {
    const uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
    const bool empty = !threads || !grid[0] || !grid[1] || !grid[2];
    const bool large = threads > 1024 || block[2] > 64 || grid[0] > INT32_MAX || grid[1] > 65535 || grid[2] > 65535;
    if (!empty && !large) return false;
    machine.code = LAUNCH;
    say(0, "invalid launch: grid (%u, %u, %u), block (%u, %u, %u)", grid[0], grid[1], grid[2], block[0], block[1],
        block[2]);
    return true;
}

// Stacks live as long as a launch: each guarded page is a mapping, a process may have 65530 of them, and every library
// has a runtime of its own.
static bool make_stacks(size_t count) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* made = mmap(nullptr, count * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (made == MAP_FAILED) return false;
    machine.stacks = static_cast<char*>(made), machine.stack_count = count;
    bool guarded = true;
    for (size_t i = 0; i < count; i++) guarded &= mprotect(machine.stacks + i * STACK, PAGE, PROT_NONE) == 0;
    return guarded;
}

static void forget_stacks() {
    if (machine.stacks) munmap(machine.stacks, machine.stack_count * STACK);
    machine.stacks = nullptr, machine.stack_count = 0;
}

static void make_threads(const unsigned* block) {
    const size_t count = size_t(block[0]) * block[1] * block[2];
    machine.threads.assign(count, Thread());
    machine.warps.assign((count + 31) / 32, Warp());
    machine.order.resize(count);
    std::iota(machine.order.begin(), machine.order.end(), 0);
    if (machine.options.order == REVERSE) std::reverse(machine.order.begin(), machine.order.end());
    for (size_t i = 0; i < count; i++) {
        Thread& thread = machine.threads[i];
        thread.number = int(i), thread.warp = int(i / 32), thread.lane = int(i % 32);
        thread.index = {unsigned(i % block[0]), unsigned(i / block[0] % block[1]), unsigned(i / block[0] / block[1])};
    }
}

static void add_memory(Region region) {
    constexpr uint64_t too_large = 64 << 20;
    const uint64_t bytes = region.end - region.begin;
    Cell* cells = nullptr;
    if (machine.options.check && region.kind != CONSTANT && bytes && bytes < too_large) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        cells = static_cast<Cell*>(mmap(nullptr, bytes * sizeof(Cell), PROT_READ | PROT_WRITE, flags, -1, 0));
        if (region.kind == GLOBAL && !region.unset)
            for (uint64_t i = 0; i < bytes; i++) cells[i].set = true;
    }
    machine.memory.push_back({region, cells, {}});
}

static Region region_of(const char* begin, const char* end, Kind kind) {
    return {uint64_t(begin), uint64_t(end), kind, kind == CONSTANT, 0, 0};
}

static void make_memory(const Region* regions, int count) {
    const size_t bytes = machine.options.dynamic_shared;
    if (machine.shared_size < bytes) {
        free(machine.shared);
        machine.shared_size = (bytes + 1023) / 1024 * 1024;
        machine.shared = static_cast<char*>(aligned_alloc(1024, machine.shared_size));
    }
    add_memory(region_of(machine.shared, machine.shared + bytes, SHARED));
    if (machine.memory[0].cells) machine.memory[0].uses.resize((bytes + 15) / 16);
    add_memory(region_of(__start_runner_shared, __stop_runner_shared, SHARED));
    add_memory(region_of(__start_runner_constant, __stop_runner_constant, CONSTANT));
    for (int i = 0; i < count; i++) add_memory(regions[i]);
}

static void forget_memory() {
    for (Shadow& shadow : machine.memory)
        if (shadow.cells) munmap(shadow.cells, (shadow.region.end - shadow.region.begin) * sizeof(Cell));
    machine.memory.clear();
}

// Signals that end a launch instead of the process, and an alarm, for as long as this lives.
struct Guard {
    static constexpr int numbers[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGVTALRM};
    struct sigaction before[4];
    stack_t stack_before;
    timer_t timer;

    explicit Guard(int seconds) {
        static char stack[65536];
        stack_t own = {};
        own.ss_sp = stack, own.ss_size = sizeof stack;
        sigaltstack(&own, &stack_before);
        struct sigaction action = {};
        action.sa_handler = on_signal, action.sa_flags = SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 4; i++) sigaction(numbers[i], &action, &before[i]);
        sigevent event = {};
        event.sigev_notify = SIGEV_THREAD_ID, event.sigev_signo = SIGVTALRM;
        event._sigev_un._tid = int(syscall(SYS_gettid));
        timer_create(CLOCK_MONOTONIC, &event, &timer);
        itimerspec time = {};
        time.it_value.tv_sec = seconds;
        timer_settime(timer, 0, &time, nullptr);
    }
    ~Guard() {
        timer_delete(timer);
        for (int i = 0; i < 4; i++) sigaction(numbers[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

int runner::run_grid(Call call, void** arguments, const unsigned* grid, const unsigned* block, const Options* options,
                     const Region* regions, int count, char* message, int length) {
    machine.call = call, machine.arguments = arguments, machine.options = *options;
    machine.message = message, machine.length = length, machine.code = 0, machine.current = nullptr;
    if (refused(grid, block)) return machine.code;
    builtins.block_size = {block[0], block[1], block[2]};
    builtins.grid_size = {grid[0], grid[1], grid[2]};
    machine.chance.seed(options->seed);
    if (!make_stacks(size_t(block[0]) * block[1] * block[2])) {
        forget_stacks();
        machine.code = LAUNCH;
        say(0, "no memory for the stacks of %u threads", block[0] * block[1] * block[2]);
        return machine.code;
    }
    make_threads(block);
    make_memory(regions, count);
    const unsigned rounding = _mm_getcsr();
    {
        Guard guard(options->seconds);
        if (options->flush) _mm_setcsr(rounding | 0x8040);
        if (!sigsetjmp(machine.escape, 1)) run_blocks(grid);
    }
    _mm_setcsr(rounding);
    machine.current = nullptr;
    forget_memory();
    forget_stacks();
    return machine.code;
}

// ---- check mode: every load and store -----------------------------------------------------------------------------

static const char* name_of(int kind) {
    return kind == SHARED ? "shared memory" : kind == GLOBAL ? "global memory" : "a table of constants";
}

static void fault_of_access(int kind, int line, const void* from, const char* words, const char* what, long offset) {
    machine.code = kind;
    int at = say(0, "%s %s, byte %ld", words, what, offset);
    Dl_info library;
    if (!line && from && dladdr(from, &library))  // launch.py asks the debugging information for the line
        at = say(at, " {at %#lx}", static_cast<const char*>(from) - static_cast<char*>(library.dli_fbase) - 1);
    say_where(at, line);
    siglongjmp(machine.escape, 1);
}

static Shadow* shadow_of(uint64_t at) {
    for (Shadow& shadow : machine.memory)
        if (at >= shadow.region.begin && at < shadow.region.end) return &shadow;
    return nullptr;
}

static void fault_of_bounds(uint64_t at, bool writes, int line, const void* from) {
    long best = INT64_MAX, offset = 0;
    const Shadow* nearest = nullptr;
    for (const Shadow& shadow : machine.memory) {
        const bool before = at < shadow.region.begin;
        const long distance = long(before ? shadow.region.begin - at : at - shadow.region.end);
        if (shadow.region.begin == shadow.region.end || distance >= best) continue;
        best = distance, nearest = &shadow, offset = long(at - shadow.region.begin);
    }
    const char* words = writes ? "write outside" : "read outside";
    fault_of_access(BOUNDS, line, from, words, nearest ? name_of(nearest->region.kind) : "all memory", offset);
}

// Whether an earlier access of another thread may come after this one as well.
static bool unordered(const Access& before) {
    if (!before.block || before.block != machine.block) return before.block;
    const Thread& self = *machine.current;
    if (before.thread == uint32_t(self.number) || before.interval != machine.interval) return false;
    if (before.thread == SEVERAL) return true;
    if (!(before.thread & OF_ONE_WARP) && knows(self, before.thread, before.epoch)) return false;
    const uint32_t warp = before.thread & OF_ONE_WARP ? before.thread & ~OF_ONE_WARP : before.thread / 32;
    return warp != uint32_t(self.warp) || before.warp_interval == machine.warps[size_t(self.warp)].interval;
}

static Access access_now() {
    const Thread& self = *machine.current;
    const uint32_t warp_interval = machine.warps[size_t(self.warp)].interval;
    return {machine.block, uint32_t(self.number), machine.interval, warp_interval, self.epoch};
}

static void remember_read(Access& read, const Access& now) {
    if (read.block && read.block != machine.block) {
        read.block = read.thread = SEVERAL;
    } else if (!read.block || read.interval != machine.interval || read.thread == now.thread) {
        read = now;
    } else {
        const uint32_t own = OF_ONE_WARP | uint32_t(machine.current->warp);
        const bool same = read.thread == own || (read.thread < OF_ONE_WARP && read.thread / 32 == now.thread / 32);
        read = now, read.thread = same ? own : SEVERAL;
    }
}

// Where barriers have phases, several may read what one of them, who has heard from all, writes next: each is kept.
static void remember_reader(Readers& readers, const Access& now) {
    const size_t before = (readers.who << (readers.who.size() - now.thread)).count();
    const auto place = readers.accesses.begin() + long(before);
    if (readers.who[now.thread])
        *place = now;
    else
        readers.accesses.insert(place, now), readers.who.set(now.thread);
}

// Whether somebody may still read what is written now. Readers before that are done with.
static bool still_read(const Cell& cell) {
    if (unordered(cell.read)) return true;
    const auto found = machine.readers.find(&cell);
    if (found == machine.readers.end()) return false;
    const std::vector<Access>& accesses = found->second.accesses;
    const bool any = std::any_of(accesses.begin(), accesses.end(), unordered);
    machine.readers.erase(found);
    return any;
}

static void check_byte(Cell& cell, const Access& now, bool writes, int kind, long offset, int line, const void* from) {
    if (cell.under_way) fault_of_access(RACE, line, from, "a copy is still under way to", name_of(kind), offset);
    if (!writes && !cell.set) fault_of_access(UNSET, line, from, "read of unset", name_of(kind), offset);
    if (unordered(cell.write))
        fault_of_access(RACE, line, from, writes ? "write-write race in" : "read-write race in", name_of(kind), offset);
    if (writes && still_read(cell)) fault_of_access(RACE, line, from, "write-read race in", name_of(kind), offset);
    if (writes)
        cell.write = now, cell.read = {}, cell.set = true, cell.time = machine.time;
    else if (kind == SHARED && !machine.phases.empty())
        remember_reader(machine.readers[&cell], now);
    else
        remember_read(cell.read, now);
}

static bool private_to_thread(uint64_t at) {
    const uint64_t stacks = uint64_t(machine.stacks), own = uint64_t(&builtins);
    return (at >= stacks && at < stacks + machine.stack_count * STACK) || (at >= own && at < own + sizeof builtins);
}

// Registers of products under way: sums are nobody's, those of left matrices may be read.
static void guard_registers(uint64_t at, int bytes, bool writes, int line, const void* from) {
    const auto meets = [&](const void* registers, size_t size) {
        return at < uint64_t(registers) + size && uint64_t(registers) < at + uint64_t(bytes);
    };
    for (const Sums& sums : machine.current->sums)
        if (meets(sums.registers, sums.values.size() * 4))
            fault_of_access(RACE, line, from, "a product is still under way to", "registers", 0);
    for (const Lefts& lefts : machine.current->lefts)
        if (writes && meets(lefts.registers, 16))
            fault_of_access(RACE, line, from, "a product still reads", "registers", 0);
}

// Whether products are done with what is written.
static void check_uses(Shadow& shadow, long offset, int bytes, int line, const void* from) {
    const Thread& self = *machine.current;
    for (long place = offset / 16; place <= (offset + bytes - 1) / 16; place++) {
        Use& use = shadow.uses[size_t(place)];
        use.barrier = nullptr;
        if (use.under_way) fault_of_access(RACE, line, from, "a product still reads", "shared memory", offset);
        for (int warp = 0; warp < int(machine.warps.size()); warp++) {
            const auto [interval, epoch] = use.ends[size_t(warp)];
            if (interval != machine.interval || warp == self.warp || knows(self, uint32_t(warp * 32), epoch)) continue;
            fault_of_access(RACE, line, from, "write-read race in", "shared memory", offset);
        }
    }
}

// Most numbers are used as a whole, and then the cell of their first byte speaks for all. From here on each byte of one
// speaks for itself.
static void part(Cell& first) {
    const int count = first.alike;
    first.alike = 0;
    const auto found = machine.readers.find(&first);
    const bool read = found != machine.readers.end();
    const Readers readers = read ? found->second : Readers();
    for (Cell* cell = &first + 1; cell < &first + count; cell++) {
        *cell = first;
        if (read) machine.readers[cell] = readers;
    }
}

// Every number that has some of these bytes. A number begins at a multiple of its size.
static void part_all(Shadow& shadow, long offset, int bytes) {
    for (int size = 1; size <= 16; size *= 2) {
        const long begin = offset - long((shadow.region.begin + uint64_t(offset)) % uint64_t(size));
        if (begin >= 0 && shadow.cells[begin].alike == size) part(shadow.cells[begin]);
    }
    for (long i = offset + 1; i < offset + bytes; i++)
        if (shadow.cells[i].alike) part(shadow.cells[i]);
}

// Whether all bytes are alike from now on.
static bool check_each(Cell* cells, int bytes, const Access& now, bool writes, int kind, long offset, int line,
                       const void* from) {
    const bool followed = kind == SHARED && !machine.phases.empty();  // reader by reader
    const Cell before = cells[0];
    bool alike = true;
    for (int i = 0; i < bytes; i++)
        if (i && !followed && !memcmp(&cells[i], &before, sizeof before))
            cells[i] = cells[0];  // what is true of the first byte is true of its like
        else
            check_byte(cells[i], now, writes, kind, offset + i, line, from), alike &= !i;
    return alike || writes;
}

static void check_access(const void* address, int bytes, bool writes, int line, const void* from) {
    const uint64_t at = uint64_t(address);
    if (!machine.options.check || !machine.current) return;
    if (private_to_thread(at)) return guard_registers(at, bytes, writes, line, from);
    Shadow* shadow = shadow_of(at);
    if (!shadow || at + uint64_t(bytes) > shadow->region.end) fault_of_bounds(at, writes, line, from);
    const Region& region = shadow->region;
    const long offset = long(at - region.begin);
    const char* what = name_of(region.kind);
    if (at & uint64_t(bytes - 1)) fault_of_access(ARITHMETIC, line, from, "misaligned access to", what, offset);
    if (writes && region.read_only) fault_of_access(BOUNDS, line, from, "write to read-only", what, offset);
    if (!shadow->cells) return;
    if (writes && !shadow->uses.empty()) check_uses(*shadow, offset, bytes, line, from);
    const Access now = access_now();
    Cell* cells = shadow->cells + offset;
    if (cells->alike == bytes) return check_byte(*cells, now, writes, region.kind, offset, line, from);
    part_all(*shadow, offset, bytes);
    if (check_each(cells, bytes, now, writes, region.kind, offset, line, from)) cells->alike = uint8_t(bytes);
}

void runner::note_read(const void* at, int bytes, int line) { check_access(at, bytes, false, line, nullptr); }
void runner::note_write(const void* at, int bytes, int line) { check_access(at, bytes, true, line, nullptr); }

// ---- copies that the program does not wait for -------------------------------------------------------------------------

static void set_under_way(const void* at, bool under_way) {
    Shadow* shadow = machine.options.check ? shadow_of(uint64_t(at)) : nullptr;
    if (!shadow || !shadow->cells) return;
    const long offset = long(uint64_t(at) - shadow->region.begin);
    Cell* cells = shadow->cells + offset;
    if (cells->alike != 16) part_all(*shadow, offset, 16);
    for (int i = 0; i < (cells->alike ? 1 : 16); i++) cells[i].under_way = under_way;
}

// 16 bytes, of which the last may be zeros. The place holds NaN until somebody waits: nobody may look at it before.
void runner::copy_later(void* to, const void* from, int bytes, int line) {
    Thread& self = *machine.current;
    if (uint64_t(to) % 16 || uint64_t(from) % 16) fault(ARITHMETIC, line, "a copy of 16 bytes from or to between");
    Copy copy = {to, {}, self.group, line};
    const int size = bytes == 16 ? 16 : 1;  // fewer may be any number
    for (int i = 0; i < bytes; i += size) note_read(static_cast<const char*>(from) + i, size, line);
    memcpy(copy.bytes, from, size_t(bytes));
    note_write(to, 16, line);
    memset(to, 0xFF, 16);
    set_under_way(to, true);
    self.copies.push_back(copy);
}

void runner::close_copies() { machine.current->group++; }

static void land(const Copy& copy, int line) {
    set_under_way(copy.to, false);
    note_write(copy.to, 16, line);
    memcpy(copy.to, copy.bytes, 16);
}

static void land_own_arrivals(Thread& self, int groups_left);

// Waits for all groups of this thread's copies but the newest.
void runner::finish_copies(int groups_left, int line) {
    Thread& self = *machine.current;
    land_own_arrivals(self, groups_left);
    std::vector<Copy> left;
    for (const Copy& copy : self.copies) {
        if (copy.group >= self.group - groups_left) {
            left.push_back(copy);
            continue;
        }
        land(copy, line);
    }
    self.copies.swap(left);
}

// ---- products of a warpgroup, whose matrices lie in shared memory ---------------------------------------------------

unsigned runner::shared_address(const void* at) {
    const char* byte = static_cast<const char*>(at);
    const bool inside = byte >= machine.shared && byte < machine.shared + machine.options.dynamic_shared;
    if (!inside) fault(BOUNDS, 0, "a shared address of what is no dynamic shared memory");
    return unsigned(byte - machine.shared) + SHARED_BEGIN;
}

void runner::show_to_products() {
    machine.current->shown = ++machine.time;
    machine.current->shown_known = machine.current->known;
}

// Whether a thread has seen the end of the phase that a copy told of; of other copies and stores it knows no more.
static bool has_come(const Ended& known, const Use& use) {
    const auto found = known.find(use.barrier);
    return found != known.end() && found->second > use.phase;
}

// A matrix by its descriptor, as the PTX manual says: the canonical layouts, in bytes and for numbers of 16 bits, and
// then pieces of 16 bytes that change places. `major` says that neighbours are along its rows or columns, not inside.
struct Described {
    unsigned start, leading, stride, base, row;  // bytes; of a row of pieces: 16, or as wide as they change places
    bool major;

    Described(uint64_t bits, bool major) : major(major) {
        const auto field = [&](int at) { return unsigned(bits >> at & 0x3fff) << 4; };
        start = field(0), leading = field(16), stride = field(32), base = unsigned(bits >> 49 & 7);
        const unsigned mode = unsigned(bits >> 62);
        row = mode == 0 ? 16 : 256u >> mode;
    }
    unsigned place(unsigned i, unsigned inner) const {  // of number `inner` of row or column i
        unsigned at;
        if (row == 16)
            at = major ? i % 8 * 2 + i / 8 * stride + inner % 8 * 16 + inner / 8 * leading
                       : i % 8 * 16 + i / 8 * stride + inner % 8 * 2 + inner / 8 * leading;
        else
            at = major ? i % (row / 2) * 2 + i / (row / 2) * leading + inner % 8 * row + inner / 8 * stride
                       : i % 8 * row + i / 8 * stride + inner * 2;
        at += start;
        const unsigned turn = ((at >> 7) - base) & (row / 16 - 1);
        return at ^ turn << 4;
    }
};

static void check_operand(Shadow& shadow, long offset, int line) {
    const Thread& self = *machine.current;
    const Use& use = shadow.uses[size_t(offset) / 16];
    const bool told = use.barrier, has_told = has_come(self.known, use), shows = has_come(self.shown_known, use);
    for (long i = offset; i < offset + 16; i += std::max<long>(shadow.cells[i].alike, 1)) {
        const Cell& cell = shadow.cells[i];
        const auto wrong = [&](int kind, const char* words) {
            fault_of_access(kind, line, nullptr, words, "shared memory", i);
        };
        if (cell.under_way) wrong(RACE, "a copy is still under way to");
        if (!cell.set) wrong(UNSET, "read of unset");
        if (told ? !has_told : unordered(cell.write)) wrong(RACE, "read-write race in");
        const bool shown = machine.threads[cell.write.thread].shown > cell.time;  // by the one who wrote
        if (!shown && !shows) wrong(RACE, "nobody has shown to products");
    }
}

// A number that a product reads, and with it the 16 bytes that it is in.
static float operand(const Described& matrix, unsigned i, unsigned inner, bool half, int line) {
    const unsigned at = matrix.place(i, inner);
    if (at < SHARED_BEGIN || at + 2 > SHARED_BEGIN + machine.options.dynamic_shared)
        fault(BOUNDS, line, "a matrix outside shared memory");
    const char* from = machine.shared + (at - SHARED_BEGIN);
    Shadow& shadow = machine.memory[0];
    if (shadow.cells) {
        const size_t place = size_t(from - machine.shared) / 16;
        Warp& warp = machine.warps[size_t(machine.current->warp)];
        if (warp.flights.empty() || warp.flights.back().place != place || warp.flights.back().group != warp.group) {
            check_operand(shadow, long(place * 16), line);
            warp.flights.push_back({place, warp.group});
            shadow.uses[place].under_way++;
        }
    }
    uint16_t bits;
    memcpy(&bits, from, 2);
    return number(bits, half);
}

// What sums have been so far: those of the last product under way, or the registers.
static Sums& sums_of(Thread& thread, const Product& product, int group) {
    const size_t count = size_t(product.columns) / 2;
    for (Sums& sums : thread.sums) {
        if (sums.registers != product.sum) continue;
        if (sums.values.size() != count) fault(RACE, 0, "products of different shapes in the same registers");
        sums.group = group;
        return sums;
    }
    thread.sums.push_back({product.sum, std::vector<float>(product.sum, product.sum + count), group});
    std::fill(product.sum, product.sum + count, NAN);
    return thread.sums.back();
}

static void multiply_of_warp(const void* const* given, void* const*, int line) {
    const Product& first = *static_cast<const Product*>(given[0]);
    Warp& warp = machine.warps[size_t(machine.current->warp)];
    Thread* lanes = &machine.threads[size_t(machine.current->warp) * 32];
    const Described left(first.left, first.left_columns != 0), right(first.right, first.rows != 0);
    const unsigned top = unsigned(machine.current->warp % 4) * 16;
    float a[64][16], b[256][16];  // of the left matrix this warp multiplies 16 rows, but may read those of the others
    for (int i = 0; i < 16 * first.columns; i++) {  // neighbours one after the other
        const int j = right.major ? i % first.columns : i / 16, k = right.major ? i / first.columns : i % 16;
        b[j][k] = operand(right, unsigned(j), unsigned(k), first.half, line);
    }
    if (!first.left_registers)
        for (unsigned n = 0; n < 64 * 16; n++) {
            const unsigned i = left.major ? n % 64 : n / 16, k = left.major ? n / 64 : n % 16;
            a[i][k] = operand(left, i, k, first.half, line);
        }
    for (int lane = 0; lane < 32; lane++) {
        const Product& mine = *static_cast<const Product*>(given[lane]);
        if (mine.left != first.left || mine.right != first.right || mine.onto != first.onto)
            fault(WARP, line, "lanes of one warp multiply different matrices");
        if (!lanes[lane].may_multiply) fault(RACE, line, "a product without a fence before it");
        for (int i = 0; mine.left_registers && i < 4; i++)
            for (int j = 0; j < 2; j++)
                a[top + lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + j] =
                    number(mine.left_registers[i] >> 16 * j, first.half);
        if (mine.left_registers) lanes[lane].lefts.push_back({mine.left_registers, warp.group});
    }
    for (int lane = 0; lane < 32; lane++) {
        Sums& sums = sums_of(lanes[lane], *static_cast<const Product*>(given[lane]), warp.group);
        for (int i = 0; i < first.columns / 2; i++) {
            const float *row = a[top + lane / 4 + i / 2 % 2 * 8], *column = b[i / 4 * 8 + lane % 4 * 2 + i % 2];
            double terms[17];
            for (int k = 0; k < 16; k++) terms[k] = double(row[k]) * column[k];
            terms[16] = first.onto ? sums.values[size_t(i)] : 0;
            sums.values[size_t(i)] = added(terms, 17);
        }
    }
}

void runner::multiply_shared(const Product* product, int line) {
    together(multiply_of_warp, product, nullptr, 0xffffffffu, line);
}

void runner::begin_products(int) {
    machine.current->may_multiply = true;
}

static void close_of_warp(const void* const*, void* const*, int) {
    machine.warps[size_t(machine.current->warp)].group++;
}

void runner::close_products() {
    static const char nothing = 0;
    together(close_of_warp, &nothing, nullptr, 0xffffffffu, 0);
}

struct Finish {
    int groups_left;
};
static void finish_of_warp(const void* const* given, void* const*, int) {
    Warp& warp = machine.warps[size_t(machine.current->warp)];
    Thread* lanes = &machine.threads[size_t(machine.current->warp) * 32];
    const int open = warp.group - static_cast<const Finish*>(given[0])->groups_left;  // groups from here on go on
    const auto ended = [&](const auto& one) { return one.group < open; };
    for (Thread* lane = lanes; lane < lanes + 32; lane++) {
        for (Sums& sums : lane->sums)
            if (ended(sums)) std::copy(sums.values.begin(), sums.values.end(), sums.registers);
        lane->sums.erase(std::remove_if(lane->sums.begin(), lane->sums.end(), ended), lane->sums.end());
        lane->lefts.erase(std::remove_if(lane->lefts.begin(), lane->lefts.end(), ended), lane->lefts.end());
        lane->may_multiply = false;
    }
    for (const Flight& flight : warp.flights) {
        if (!ended(flight)) continue;
        Use& use = machine.memory[0].uses[flight.place];
        use.under_way--, use.ends[size_t(machine.current->warp)] = {machine.interval, lanes[0].epoch};
    }
    warp.flights.erase(std::remove_if(warp.flights.begin(), warp.flights.end(), ended), warp.flights.end());
}

void runner::finish_products(int groups_left, int line) {
    const Finish given = {groups_left};
    together(finish_of_warp, &given, nullptr, 0xffffffffu, line);
}

// ---- barriers of some threads, and barriers with phases -------------------------------------------------------------

void runner::named_barrier(int number, int threads, int line) {
    Thread& self = *machine.current;
    self.named = number, self.state = AT_NAMED, self.line = line;
    const auto here = [&](const Thread& one) { return one.state == AT_NAMED && one.named == number; };
    if (std::count_if(machine.threads.begin(), machine.threads.end(), here) < threads) return leave(AT_NAMED, line);
    tell_each_other(here);
    for (Thread& one : machine.threads)
        if (here(one)) one.state = READY;
}

static Phases& phases_of(void* barrier, int line) {
    note_read(barrier, 8, line);
    const auto found = machine.phases.find(barrier);
    if (found == machine.phases.end()) fault(UNSET, line, "a barrier that nobody has set up");
    return found->second;
}

void runner::set_up(void* barrier, int arrivals, int line) {
    note_write(barrier, 8, line);
    machine.phases[barrier] = {arrivals, arrivals, 0, {}, {}};
}

static void count_arrival(void* barrier, Phases& phases, const Clock& clock) {
    learn(phases.gathered, clock);
    if (--phases.pending) return;
    phases.pending = phases.arrivals, phases.phase++;
    phases.known = phases.gathered;
    for (Thread& one : machine.threads)
        if (one.state == IN_PHASE && one.awaited == barrier) one.state = READY;
}

void runner::arrive(void* barrier, int line) {
    Phases& phases = phases_of(barrier, line);
    go_on(*machine.current);
    count_arrival(barrier, phases, machine.current->clock);
}

// The copies land, and the arrival counts, when nothing else goes on.
void runner::arrive_with_copies(void* barrier, int line) {
    phases_of(barrier, line);
    Thread& self = *machine.current;
    go_on(self);
    machine.coming.push_back({self.number, barrier, std::move(self.copies), self.clock, line});
    self.copies.clear();
}

void runner::wait_for_phase(void* barrier, int phase, int line) {
    Thread& self = *machine.current;
    Phases& phases = phases_of(barrier, line);
    for (self.awaited = barrier; (phases.phase & 1) == uint32_t(phase & 1);) leave(IN_PHASE, line);
    learn(self.clock, phases.known);
    self.known[barrier] = phases.phase;
}

// Who reads the copy must wait for this barrier.
static void tell(const Copy& copy, const void* barrier) {
    Shadow* shadow = machine.options.check ? shadow_of(uint64_t(copy.to)) : nullptr;
    if (!shadow || shadow->uses.empty()) return;
    Use& use = shadow->uses[(uint64_t(copy.to) - shadow->region.begin) / 16];
    use.barrier = barrier, use.phase = machine.phases[barrier].phase;
}

// An arrival that comes with copies, as the thread that has begun them.
static void land_arrival(size_t place) {
    Arrival arrival = std::move(machine.coming[place]);
    machine.coming.erase(machine.coming.begin() + long(place));
    Thread *before = machine.current, &thread = machine.threads[size_t(arrival.thread)];
    machine.current = &thread, builtins.thread = thread.index;
    arrival.clock.swap(thread.clock);
    const uint32_t epoch = thread.epoch;
    thread.epoch = thread.clock[size_t(thread.number)] - 1;  // they were written before the thread went on
    for (const Copy& copy : arrival.copies) land(copy, arrival.line), tell(copy, arrival.barrier);
    thread.epoch = epoch;
    arrival.clock.swap(thread.clock);
    machine.current = before, machine.time++;
    count_arrival(arrival.barrier, machine.phases[arrival.barrier], arrival.clock);
}

static bool land_copies() {
    if (machine.coming.empty()) return false;
    const size_t last = machine.coming.size() - 1;
    const int order = machine.options.order;
    land_arrival(order == FORWARD ? 0 : order == REVERSE ? last : machine.chance() % (last + 1));
    return true;
}

// Those that a thread waits for itself.
static void land_own_arrivals(Thread& self, int groups_left) {
    const auto own = [&](const Arrival& arrival) {
        const auto waited_for = [&](const Copy& copy) { return copy.group < self.group - groups_left; };
        return arrival.thread == self.number && std::all_of(arrival.copies.begin(), arrival.copies.end(), waited_for);
    };
    for (size_t i = 0; i < machine.coming.size();)
        if (own(machine.coming[i]))
            land_arrival(i);
        else
            i++;
}

#define HOOKS(bytes)                                                                                                   \
    void __tsan_read##bytes(void* at) { check_access(at, bytes, false, 0, __builtin_return_address(0)); }            \
    void __tsan_write##bytes(void* at) { check_access(at, bytes, true, 0, __builtin_return_address(0)); }
#define WRONG(name, words) \
    void __ubsan_handle_##name(Place* place, ...) { fault(ARITHMETIC, int(place->line), words); }

extern "C" {
struct Place {
    const char* file;
    unsigned line, column;
};
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(char* at, long bytes) {
    for (long i = 0; i < bytes; i++) check_access(at + i, 1, false, 0, __builtin_return_address(0));
}
void __tsan_write_range(char* at, long bytes) {
    for (long i = 0; i < bytes; i++) check_access(at + i, 1, true, 0, __builtin_return_address(0));
}
void __tsan_init() {}
WRONG(add_overflow, "integer overflow in a sum")
WRONG(sub_overflow, "integer overflow in a difference")
WRONG(mul_overflow, "integer overflow in a product")
WRONG(negate_overflow, "integer overflow in a negation")
WRONG(divrem_overflow, "integer division by zero")
WRONG(shift_out_of_bounds, "shift by too many bits")
WRONG(out_of_bounds, "index outside its array")
WRONG(type_mismatch_v1, "misaligned or null pointer")
}
