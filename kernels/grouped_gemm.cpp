// Groups of float32 rows, each times its own bfloat16 weight; `grouped_gemm.py` says what for.
//
// Every product is summed in the order of its inputs, so a row's result depends neither on the rows beside it nor on
// the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <omp.h>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
constexpr int ROWS = 8;  // computed together: each weight is widened once for all of them
#else
constexpr int LANES = 8;
constexpr int ROWS = 6;
#endif
constexpr int TILE = 2 * LANES;   // outputs whose weights lie side by side
constexpr int64_t STRETCH = 512;  // inputs of a tile, and of its rows, that stay in the first cache
constexpr int64_t AHEAD = 2048;   // weights: the processor's own prefetching stops at every page
constexpr int64_t READING = 3;    // what reading and widening a weight costs, in rows

typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef float Floats __attribute__((vector_size(LANES * 4)));

// weights [length, TILE], row n of N at rows + n * row_stride; sums [N, TILE] at sums + n * sums_stride
template <int N>
void multiply_block(const uint16_t *weights, int64_t length, const float *rows, int64_t row_stride, float *sums,
                    int64_t sums_stride, bool is_first) {
    const float *row[N];
    Floats low[N] = {}, high[N] = {};
    for (int n = 0; n < N; n++) {
        row[n] = rows + n * row_stride;
        if (is_first) continue;
        std::memcpy(&low[n], sums + n * sums_stride, sizeof low[n]);
        std::memcpy(&high[n], sums + n * sums_stride + LANES, sizeof high[n]);
    }
    for (int64_t i = 0; i < length; i++) {
        __builtin_prefetch(weights + i * TILE + AHEAD);
        Words pairs;
        std::memcpy(&pairs, weights + i * TILE, sizeof pairs);
        const Floats even = (Floats)(pairs << 16), odd = (Floats)(pairs & 0xffff0000u);
        for (int n = 0; n < N; n++) {
            low[n] += even * row[n][i];
            high[n] += odd * row[n][i];
        }
    }
    for (int n = 0; n < N; n++) {
        std::memcpy(sums + n * sums_stride, &low[n], sizeof low[n]);
        std::memcpy(sums + n * sums_stride + LANES, &high[n], sizeof high[n]);
    }
}

using Block = void (*)(const uint16_t *, int64_t, const float *, int64_t, float *, int64_t, bool);
constexpr Block BLOCKS[] = {multiply_block<1>, multiply_block<2>, multiply_block<3>, multiply_block<4>,
                            multiply_block<5>, multiply_block<6>, multiply_block<7>, multiply_block<8>};
static_assert(ROWS <= sizeof BLOCKS / sizeof *BLOCKS);

// A tile [length, TILE] for rows [num_rows, length]
void multiply_tile(const uint16_t *tile, const float *rows, int64_t num_rows, int64_t length, float *out,
                   int64_t out_stride) {
    for (int64_t i = 0; i < length; i += STRETCH)
        for (int64_t n = 0; n < num_rows; n += ROWS)
            BLOCKS[std::min<int64_t>(ROWS, num_rows - n) - 1](tile + i * TILE, std::min(STRETCH, length - i),
                                                              rows + n * length + i, length, out + n * out_stride,
                                                              out_stride, i == 0);
}

}  // namespace

extern "C" {

extern const int tile_size = TILE;

// weights: of each of num_groups groups, tiles [num_tiles, length, TILE] bfloat16, the two halves of a tile's outputs
// in turn; sizes: rows of each group; rows [sum of sizes, length], out [sum of sizes, num_tiles * TILE] float32
void grouped_gemm(const uint16_t *const *weights, const int64_t *sizes, int64_t num_groups, const float *rows,
                  float *out, int64_t num_tiles, int64_t length, int num_threads) {
    int64_t cost = 0;
    for (int64_t g = 0; g < num_groups; g++) cost += (sizes[g] + READING) * num_tiles;
#pragma omp parallel num_threads(num_threads)
    {
        // A thread computes the tiles that begin in its part of the cost
        const int64_t begin = cost * omp_get_thread_num() / omp_get_num_threads();
        const int64_t end = cost * (omp_get_thread_num() + 1) / omp_get_num_threads();
        int64_t place = 0, row = 0;
        for (int64_t g = 0; g < num_groups; row += sizes[g], g++)
            for (int64_t t = 0; t < num_tiles; t++, place += sizes[g] + READING)
                if (begin <= place && place < end)
                    multiply_tile(weights[g] + t * length * TILE, rows + row * length, sizes[g], length,
                                  out + row * num_tiles * TILE + t * TILE, num_tiles * TILE);
    }
}
}
