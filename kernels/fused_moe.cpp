// Groups of float32 rows, each times its own bfloat16 weight, whole layers of experts, and the norms between them;
// `fused_moe.py` says what for.
//
// Every product is summed in the order of its inputs, so a row's result depends neither on the rows beside it nor on
// the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
constexpr int ROWS = 8;  // computed together: each weight is widened once for all of them
#else
constexpr int LANES = 8;
constexpr int ROWS = 6;
#endif
constexpr int TILE = 2 * LANES;      // outputs whose weights lie side by side
constexpr int64_t STRETCH = 512;     // inputs of a tile, and of its rows, that stay in the first cache
constexpr int64_t AHEAD = 2048;      // weights: the processor's own prefetching stops at every page
constexpr int64_t TAKEN = 1 << 18;   // weights that a thread takes at a time
constexpr int64_t GROUP_ROWS = 64;   // larger groups are cut: so many rows' results still have their pages at hand
constexpr int64_t BATCH_ROWS = 256;  // whose inner results are held at once
constexpr int64_t NORM_ALONE = 1 << 16;  // numbers that one thread norms before another would wake up

typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef float Floats __attribute__((vector_size(LANES * 4)));

struct Group {
    const uint16_t *weight;
    int64_t expert, start, size;
};

// weights [length, TILE], rows[n][first ..] for n of N; sums [N, TILE] at sums + n * sums_stride
template <int N>
void multiply_block(const uint16_t *weights, int64_t length, const float *const *rows, int64_t first, float *sums,
                    int64_t sums_stride) {
    const float *row[N];
    Floats low[N] = {}, high[N] = {};
    for (int n = 0; n < N; n++) {
        row[n] = rows[n] + first;
        if (first == 0) continue;
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

using Block = void (*)(const uint16_t *, int64_t, const float *const *, int64_t, float *, int64_t);
constexpr Block BLOCKS[] = {multiply_block<1>, multiply_block<2>, multiply_block<3>, multiply_block<4>,
                            multiply_block<5>, multiply_block<6>, multiply_block<7>, multiply_block<8>};
static_assert(ROWS <= sizeof BLOCKS / sizeof *BLOCKS);

// A tile [length, TILE] for num_rows rows of that length
void multiply_tile(const uint16_t *tile, const float *const *rows, int64_t num_rows, int64_t length, float *out,
                   int64_t out_stride) {
    for (int64_t i = 0; i < length; i += STRETCH)
        for (int64_t n = 0; n < num_rows; n += ROWS)
            BLOCKS[std::min<int64_t>(ROWS, num_rows - n) - 1](tile + i * TILE, std::min(STRETCH, length - i), rows + n,
                                                              i, out + n * out_stride, out_stride);
}

// Calls work(group, tile) for all tiles, of `length` inputs each. A thread takes the next few when it has done its
// last: another program may hold one of them up at any time
template <typename Work>
void share(const Group *groups, int64_t num_groups, int64_t num_tiles, int64_t length, Work work) {
    const int64_t together = std::max<int64_t>(1, TAKEN / (length * TILE));
#pragma omp for schedule(dynamic, together)
    for (int64_t i = 0; i < num_groups * num_tiles; i++) work(groups[i / num_tiles], i % num_tiles);
}

void add_group(std::vector<Group> &groups, const uint16_t *weight, int64_t expert, int64_t start, int64_t size) {
    for (int64_t done = 0; done < size; done += GROUP_ROWS)
        groups.push_back({weight, expert, start + done, std::min(GROUP_ROWS, size - done)});
}

// exp to two units in the last place (Cephes); numbers whose result leaves float32 are held at its ends
inline Floats exponential(Floats x) {
    const Floats zero = {}, most = zero + 88.0f, least = zero - 87.0f;
    x = x > most ? most : x;
    x = x < least ? least : x;
    const Floats rounder = zero + 12582912.0f;  // 1.5 x 2^23: adding it rounds to whole numbers
    const Floats whole = (x * 1.44269504088896341f + rounder) - rounder;
    const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
    return p * (Floats)exponent;
}

// gates and ups [num_rows, TILE] to out [num_rows, TILE] at out + n * stride
void silu_and_mul(const float *gates, const float *ups, int64_t num_rows, float *out, int64_t stride) {
    for (int64_t n = 0; n < num_rows; n++)
        for (int64_t o = 0; o < TILE; o += LANES) {
            Floats gate, up;
            std::memcpy(&gate, gates + n * TILE + o, sizeof gate);
            std::memcpy(&up, ups + n * TILE + o, sizeof up);
            const Floats gated = gate / (exponential(-gate) + 1.0f) * up;
            std::memcpy(out + n * stride + o, &gated, sizeof gated);
        }
}

float *at_least(std::vector<float> &buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
}

}  // namespace

extern "C" {

extern const int tile_size = TILE;

// weights: of each of num_groups groups, tiles [num_tiles, length, TILE] bfloat16, the two halves of a tile's outputs
// in turn; sizes: rows of each group; rows [sum of sizes, length], out [sum of sizes, num_tiles * TILE] float32
void grouped_gemm(const uint16_t *const *weights, const int64_t *sizes, int64_t num_groups, const float *rows,
                  float *out, int64_t num_tiles, int64_t length, int num_threads) {
    std::vector<Group> groups;
    std::vector<const float *> row_at;
    for (int64_t g = 0; g < num_groups; g++) {
        add_group(groups, weights[g], g, row_at.size(), sizes[g]);
        for (int64_t n = 0; n < sizes[g]; n++) row_at.push_back(rows + row_at.size() * length);
    }
#pragma omp parallel num_threads(num_threads)
    share(groups.data(), groups.size(), num_tiles, length, [&](const Group &group, int64_t t) {
        multiply_tile(group.weight + t * length * TILE, row_at.data() + group.start, group.size, length,
                      out + (group.start * num_tiles + t) * TILE, num_tiles * TILE);
    });
}

// Experts whose gate is SiLU. ups: of each expert, tiles of [2 * inner, hidden], gates first; downs: tiles of [hidden,
// inner]; ids [num_rows, top_k], num_experts or more for none; weights [num_rows, top_k]; hidden and out [num_rows,
// hidden]. inner is a multiple of TILE. Returns how many distinct experts ran, -1 if an id is negative.
int64_t fused_moe(const uint16_t *const *ups, const uint16_t *const *downs, int64_t num_experts, const int64_t *ids,
                  const float *weights, int64_t num_rows, int64_t top_k, const float *hidden, float *out,
                  int64_t hidden_size, int64_t inner_size, int num_threads) {
    const int64_t num_pairs = num_rows * top_k;
    std::vector<int64_t> starts(num_experts + 2, 0), place(num_pairs);
    for (int64_t p = 0; p < num_pairs; p++) {
        if (ids[p] < 0) return -1;
        starts[std::min(ids[p], num_experts) + 1]++;
    }
    std::vector<Group> groups;
    int64_t num_active = 0;
    for (int64_t e = 0; e < num_experts; e++) {
        num_active += starts[e + 1] > 0;
        add_group(groups, ups[e], e, starts[e], starts[e + 1]);
        starts[e + 1] += starts[e];
    }
    const int64_t num_chosen = starts[num_experts];
    std::vector<const float *> rows(num_pairs), inner_rows(BATCH_ROWS);
    for (int64_t p = 0; p < num_pairs; p++) {
        place[p] = starts[std::min(ids[p], num_experts)]++;  // those of "none" come last
        rows[place[p]] = hidden + p / top_k * hidden_size;
    }
    const int64_t inner_tiles = inner_size / TILE, hidden_tiles = (hidden_size + TILE - 1) / TILE;
    const int64_t result_stride = hidden_tiles * TILE;
    static thread_local std::vector<float> inner_buffer, result_buffer;
    float *inner = at_least(inner_buffer, std::min(BATCH_ROWS, num_chosen) * inner_size);
    float *results = at_least(result_buffer, num_chosen * result_stride);
    for (int64_t n = 0; n < BATCH_ROWS; n++) inner_rows[n] = inner + n * inner_size;

#pragma omp parallel num_threads(num_threads)
    {
        for (size_t first = 0, last = 0; first < groups.size(); first = last) {
            const int64_t start = groups[first].start;
            while (last < groups.size() && groups[last].start + groups[last].size - start <= BATCH_ROWS) last++;
            share(&groups[first], last - first, inner_tiles, hidden_size, [&](const Group &group, int64_t t) {
                float gate[GROUP_ROWS * TILE], up[GROUP_ROWS * TILE];
                const float *const *given = rows.data() + group.start;
                multiply_tile(group.weight + t * hidden_size * TILE, given, group.size, hidden_size, gate, TILE);
                multiply_tile(group.weight + (inner_tiles + t) * hidden_size * TILE, given, group.size, hidden_size, up,
                              TILE);
                silu_and_mul(gate, up, group.size, inner + (group.start - start) * inner_size + t * TILE, inner_size);
            });
            share(&groups[first], last - first, hidden_tiles, inner_size, [&](const Group &group, int64_t t) {
                multiply_tile(downs[group.expert] + t * inner_size * TILE, inner_rows.data() + group.start - start,
                              group.size, inner_size, results + group.start * result_stride + t * TILE, result_stride);
            });
        }
#pragma omp for
        for (int64_t n = 0; n < num_rows; n++) {
            float *sum = out + n * hidden_size;
            std::fill_n(sum, hidden_size, 0.0f);
            for (int64_t p = n * top_k; p < (n + 1) * top_k; p++)
                for (int64_t h = 0; place[p] < num_chosen && h < hidden_size; h++)
                    sum[h] += weights[p] * results[place[p] * result_stride + h];
        }
    }
    return num_active;
}

// rows and out [num_rows, size], weight [size]: each row over its root mean square, times the weight
void rms_norm(const float *rows, const float *weight, float *out, int64_t num_rows, int64_t size, float eps,
              int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * size > NORM_ALONE)
    for (int64_t n = 0; n < num_rows; n++) {
        const float *row = rows + n * size;
        float lanes[LANES] = {};
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES)
            for (int lane = 0; lane < LANES; lane++) lanes[lane] += row[i + lane] * row[i + lane];
        float squares = 0.0f;
        for (; i < size; i++) squares += row[i] * row[i];
        for (int lane = 0; lane < LANES; lane++) squares += lanes[lane];
        const float scale = 1.0f / std::sqrt(squares / size + eps);
        for (int64_t o = 0; o < size; o++) out[n * size + o] = weight[o] * (row[o] * scale);
    }
}
}
