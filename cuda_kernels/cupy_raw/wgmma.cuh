// Tensor cores of Hopper (sm_90a): products by a warpgroup, four warps, of matrices that lie in shared memory.
//
// A product is 64 x 16 times 16 x N, of numbers of 16 bits, added in float. Warp w of the four has the 16 rows from
// 16 w on of the left matrix and of the sum; in these, with line = lane / 4 and pair = lane % 4 * 2:
//
//   left      a[i]:  row line + 8 (i % 2),  inner pair + 8 (i / 2)  and the one after it
//   sum       x[i]:  row line + 8 (i / 2 % 2),  column 8 (i / 4) + pair + i % 2
//
// as for the products of one warp in tensor.cuh. They are asynchronous: between the fence before the first product and
// the end of the wait after the last, nobody touches the registers of the sums, nor changes those of a left matrix.
//
// In shared memory a matrix is cut in blocks of 64 columns. A row of a block has 128 bytes, and its pieces of 16 bytes
// change places: piece c of row r is at place c ^ r % 8. Blocks begin at multiples of 1024 bytes.

#ifdef __CUDACC_RTC__
// What was written to shared memory, and is known to this thread, is there for the products that it begins after this.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Before the first product of a group, and whenever registers of one were touched.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// The products since the last call are a group.
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait for all groups but the newest; the sums of those that are done may be used behind `done`.
template <int GROUPS>
__device__ __forceinline__ void finish_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(GROUPS) : "memory");
}
template <int R>
__device__ __forceinline__ void done(float (&sum)[R]) {
    #pragma unroll
    for (int i = 0; i < R; i++) asm volatile("" : "+f"(sum[i]) :: "memory");
}
// Registers of each thread of a warpgroup, which those that need few leave to those that need many.
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}

// The number of this thread, which the compiler does not know to be the same whenever it is asked.
__device__ __forceinline__ unsigned this_thread() {
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
// All threads of one warpgroup of several; see PTX: barrier 0 is that of the block.
__device__ __forceinline__ void warpgroup_barrier(int group) {
    asm volatile("bar.sync %0, 128;" :: "r"(group + 1) : "memory");
}
// All threads of two warpgroups.
__device__ __forceinline__ void both_warpgroups() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// A barrier in shared memory. It counts arrivals, and when all are there its phase ends and the next one begins.
typedef unsigned long long Barrier;
__device__ __forceinline__ void set_up(Barrier& barrier, int arrivals) {  // by one thread, before all others use it
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(&barrier)) : "memory");
}
// The same, once all copies that this thread has begun are there.
__device__ __forceinline__ void arrive_with_copies(Barrier& barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(shared_address(&barrier)) : "memory");
}
// Wait for the end of a phase; those with even numbers are 0, the others 1.
__device__ __forceinline__ void wait(Barrier& barrier, int phase) {
    asm volatile(
        "{\n.reg .pred p;\nLAB_WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra LAB_WAIT;\nDONE:\n}"
        :: "r"(shared_address(&barrier)), "r"(phase) : "memory");
}

#define REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32                                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                             \
    REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "      \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_8(x, i)                                                                             \
    "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
        "+f"(x[i + 6]), "+f"(x[i + 7])
#define SUMS_16(x, i) SUMS_8(x, i), SUMS_8(x, i + 8)
#define SUMS_32(x, i) SUMS_8(x, i), SUMS_8(x, i + 8), SUMS_8(x, i + 16), SUMS_8(x, i + 24)
#define SUMS_64(x, i) SUMS_32(x, i), SUMS_32(x, i + 32)

// sum = a b, or sum += a b, where rows of a and columns of b lie in shared memory; the same where rows of both lie there,
// or columns of a and rows of b; and where a is in registers and rows of b lie in shared memory, or columns of b. Matrices
// there are given by their descriptors.
#define PRODUCTS(format, type, columns, half, a, b, c, d, e, f)                                                       \
    FROM_MEMORY(wgmma_##format, type, columns, half, a, b, c, "0, 0")                                                  \
    FROM_MEMORY(wgmma_##format##_rows, type, columns, half, a, b, c, "0, 1")                                           \
    FROM_MEMORY(wgmma_##format##_tokens, type, columns, half, a, b, c, "1, 1")                                         \
    FROM_REGISTERS(wgmma_##format, type, columns, half, a, b, c, d, e, f, "1")                                         \
    FROM_REGISTERS(wgmma_##format##_columns, type, columns, half, a, b, c, d, e, f, "0")
#define FROM_MEMORY(name, type, columns, half, a, b, c, lies)                                                         \
    template <>                                                                                                        \
    __device__ __forceinline__ void name<columns>(float (&sum)[half], Matrix left, Matrix right, int onto) {           \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #c ", 0;\n"                                                  \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                             \
                     " {" REGISTERS_##half "}, %" #a ", %" #b ", p, 1, 1, " lies ";\n}"                                \
                     : SUMS_##half(sum, 0) : "l"(left), "l"(right), "r"(onto));                                        \
    }
#define FROM_REGISTERS(name, type, columns, half, a, b, c, d, e, f, rows)                                              \
    template <>                                                                                                        \
    __device__ __forceinline__ void name<columns>(float (&sum)[half], const unsigned (&left)[4], Matrix right,         \
                                                  int onto) {                                                          \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #f ", 0;\n"                                                  \
                     "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                             \
                     " {" REGISTERS_##half "}, {%" #a ", %" #b ", %" #c ", %" #d "}, %" #e ", p, 1, 1, " rows ";\n}"   \
                     : SUMS_##half(sum, 0)                                                                             \
                     : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(onto));                 \
    }
typedef unsigned long long Matrix;
template <int N> __device__ void wgmma_bf16(float (&sum)[N / 2], Matrix left, Matrix right, int onto);
template <int N> __device__ void wgmma_bf16_rows(float (&sum)[N / 2], Matrix left, Matrix right, int onto);
template <int N> __device__ void wgmma_bf16_tokens(float (&sum)[N / 2], Matrix left, Matrix right, int onto);
template <int N> __device__ void wgmma_bf16(float (&sum)[N / 2], const unsigned (&left)[4], Matrix right, int onto = 1);
template <int N> __device__ void wgmma_bf16_columns(float (&sum)[N / 2], const unsigned (&left)[4], Matrix right,
                                                    int onto);
template <int N> __device__ void wgmma_f16(float (&sum)[N / 2], Matrix left, Matrix right, int onto);
template <int N> __device__ void wgmma_f16_rows(float (&sum)[N / 2], Matrix left, Matrix right, int onto);
template <int N> __device__ void wgmma_f16_tokens(float (&sum)[N / 2], Matrix left, Matrix right, int onto);
template <int N> __device__ void wgmma_f16(float (&sum)[N / 2], const unsigned (&left)[4], Matrix right, int onto = 1);
template <int N> __device__ void wgmma_f16_columns(float (&sum)[N / 2], const unsigned (&left)[4], Matrix right,
                                                   int onto);
PRODUCTS(bf16, "bf16", 32, 16, 16, 17, 18, 19, 20, 21)
PRODUCTS(bf16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37)
PRODUCTS(bf16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69)
PRODUCTS(f16, "f16", 64, 32, 32, 33, 34, 35, 36, 37)
PRODUCTS(f16, "f16", 128, 64, 64, 65, 66, 67, 68, 69)

// Four matrices of 8 x 8 to shared memory; load_matrices and load_transposed_matrices of tensor.cuh bring them back:
// x[m] of a lane holds of matrix m row `line`, columns pair and pair + 1, or column `line`, rows pair and pair + 1.
__device__ __forceinline__ void store_transposed_matrices(const unsigned (&x)[4], void* row) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(shared_address(row)), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ __forceinline__ void store_matrices(const unsigned (&x)[4], void* row) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(shared_address(row)), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
#endif  // for the CPU, the header that defines threads defines these too

// A matrix of R rows in shared memory, of numbers of 16 bits, as products take it; others are cut in the same way.
template <class T, int R, int C>
struct Swizzled {
    static constexpr int rows = R, columns = C, bytes = R * C * sizeof(T), wide = 16 / sizeof(T);
    unsigned char* begin;

    // 16 bytes of a row, which are `wide` numbers, from a column on that is a multiple of that.
    __device__ __forceinline__ unsigned char* piece(int row, int column) const {
        return begin + column / (8 * wide) * (R * 128) + row * 128 + ((column / wide ^ row) & 7) * 16;
    }
    // Its bits: where it begins; from a block to the next, which counts where rows are columns of the product; from
    // eight rows to the next eight; and that pieces change places in 128 bytes. In units of 16 bytes.
    __device__ __forceinline__ Matrix matrix() const {
        const Matrix start = (shared_address(begin) & 0x3ffff) >> 4;
        return start | Matrix(R * 128 >> 4) << 16 | Matrix(1024 >> 4) << 32 | Matrix(1) << 62;
    }
    // The part of it that begins at a row, a multiple of 8, and a column, a multiple of 16.
    static __device__ __forceinline__ Matrix part(Matrix whole, int row, int column) {
        return whole + (unsigned(column / 64 * (R * 128) + row * 128 + column % 64 * int(sizeof(T))) >> 4);
    }
};

template <class T, int N>
struct Product;
template <int N>
struct Product<bfloat16, N> {
    template <class... Given>
    static __device__ __forceinline__ void begin(float (&sum)[N / 2], const Given&... given) {
        wgmma_bf16<N>(sum, given...);
    }
};
template <int N>
struct Product<float16, N> {
    template <class... Given>
    static __device__ __forceinline__ void begin(float (&sum)[N / 2], const Given&... given) {
        wgmma_f16<N>(sum, given...);
    }
};
