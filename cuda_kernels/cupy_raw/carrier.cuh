// Chunks of an array on their way to shared memory, to tiles that products of a warpgroup take: see wgmma.cuh.

// What a lane brings of one array: of every row of a chunk, or every second or fourth, 16 bytes. All that it needs is
// in its registers: between two copies there is no time to ask shared memory where the next one is.
template <class Tile, class T = data>
struct Carrier {
    static constexpr int wide = Tile::wide, pieces = Tile::columns / wide, step = 32 / pieces;
    const T* at;  // in the next chunk
    long long row, column;
    int first, piece, numbers;  // the first row and the column in the tile, and the numbers there
    bool vectors;

    __device__ __forceinline__ Carrier(const Rows<const T>& from, int first_token, int first_column, int columns)
        : row(from.row), column(from.column), first(threadIdx.x % 32 / pieces), piece(threadIdx.x % pieces * wide),
          numbers(max(min(columns - piece, int(wide)), 0)), vectors(in_vectors(from) && columns % wide == 0) {
        at = &from.at(first_token + first, first_column + piece);
    }
    // tile[i][j] = the array's number for i < rows, zero elsewhere.
    __device__ __forceinline__ void bring(Tile tile, int rows) {
        if (vectors) {
            const int left = numbers > 0 ? rows - first : 0;
            #pragma unroll 1
            for (int i = 0; i < 8; i += step) {  // rows of one place among eight
                unsigned char* to = tile.piece(first + i, piece);
                const T* from = at + i * row;
                #pragma unroll
                for (int far = 0; far < Tile::rows; far += 8, from += 8 * row)
                    copy_later(to + far * 128, from, i + far < left ? 16 : 0);
            }
        } else {
            #pragma unroll 1
            for (int i = first; i < Tile::rows; i += step)
                for (int j = 0; j < wide; j++)
                    reinterpret_cast<T*>(tile.piece(i, piece))[j] =
                        i < rows && j < numbers ? at[(i - first) * row + j * column] : T{};
        }
        at += Tile::rows * row;
    }
    __device__ __forceinline__ void hand_over(Barrier& there) const {
        if (vectors) return arrive_with_copies(there);
        show_to_products();
        arrive(there);
    }
};
