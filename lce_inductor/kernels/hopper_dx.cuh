// The product for dX: P[n, h] = sum over v of E[n, v] weight[v, h]      E [chunk rows, row_stride], weight [V, H]; P [n, H] fp32
//
// A chunk has few tiles and each takes all V classes: they rarely come out even on the GPU's multiprocessors. So the classes
// are cut into `splits` parts, one part of all tiles after another, and a part waits until the one before it has added its
// sums: the order is always the same, and so are the bits.
//
// Which cluster computes a part makes no difference to that, and is not fixed: each running cluster claims the lowest one
// that is left. So a part waits for lower ones only, which running clusters have and take in rising order: the lowest that
// is unfinished is never held up, however few clusters the GPU has room for beside other work.

#define PARTS  // of the inner dimension: splits(), part_at(), announce() and what is claimed are here

constexpr bool TRANSPOSED_A = false, TRANSPOSED_B = true;  // E is K-major, weight N-major
constexpr int STAGING_BYTES = WIDE_BYTES;

struct Arguments {
    int rows, columns, inner;  // of the product: n, H, V
    int group;                 // pairs of row tiles that share columns
    int splits, part;          // parts of the inner dimension, steps of each; the last may have fewer
    int before;                // what `arrived` holds before this launch
    int row0;                  // where the chunk begins
    const int* counted;        // how many rows of the call count; null: all
    int* next;                 // the lowest part that nobody has claimed; 0 before a launch and after it
    int* arrived;              // [row tiles, column tiles]: parts of a tile that have been added
};

__device__ __forceinline__ int rows_of(const Arguments& a) { return rows_that_count(a.rows, a.row0, a.counted); }
__device__ __forceinline__ int inner_of(const Arguments& a) { return a.inner; }
__device__ __forceinline__ bool nothing_to_do(const Arguments& a) { return rows_of(a) == 0; }
__device__ __forceinline__ bool wanted(const Arguments&, int) { return true; }
__device__ __forceinline__ int splits(const Arguments& a) { return a.splits; }

__device__ __forceinline__ Tile part_at(const Arguments& a, int tile, int pairs, int columns, int steps) {
    const int tiles = pairs * columns;
    Tile t = tile_at(tile % tiles, pairs, columns, a.group, steps);
    t.k = tile / tiles * a.part;
    t.steps = min(a.part, steps - t.k);
    return t;
}

// What the cluster has claimed, in each block's shared memory for every warp that needs to know: its i-th item beside i + 1,
// so that one load tells both. Nobody is waited for before an entry is used again: a warp that is yet to read item i has
// taken part in nothing later. Of what comes after i, only the other warpgroup's next item can be over, and each of the
// others has a stage or waits for one: what is being fetched is at most i + 1 + STAGES, and one more is claimed ahead.
static_assert(CLAIMED >= STAGES + 3, "an item would be overwritten before it is read");

__device__ __forceinline__ void clear_claims(u32 claims) {
    if (threadIdx.x < CLAIMED) asm volatile("st.shared.b64 [%0], %1;" ::"r"(claims + 8 * threadIdx.x), "l"(0ull) : "memory");
}

__device__ __forceinline__ int claim(const Arguments& a) { return atomicAdd(a.next, 1); }

// Each cluster claims once beyond the last item. Whoever is last of all to do so leaves the counter as it was.
__device__ __forceinline__ void publish(const Arguments& a, u32 claims, int i, int item, int count) {
    if (item == count + (int)gridDim.x / 2 - 1) *a.next = 0;
    FOR(block, 2)
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "st.relaxed.cluster.shared::cluster.b64 [there], %2;\n}" ::"r"(claims + i % CLAIMED * 8),
        "r"(block), "l"((u64)(i + 1) << 32 | (u32)item)
        : "memory");
}

__device__ __forceinline__ int claimed(u32 claims, int, int i) {
    u64 found;
    do
        asm volatile("ld.relaxed.cluster.shared::cta.b64 %0, [%1];" : "=l"(found) : "r"(claims + i % CLAIMED * 8) : "memory");
    while ((int)(found >> 32) != i + 1);
    return (int)(u32)found;
}

// The same for a whole warp, and for the compiler: the same in all of it.
__device__ __forceinline__ int claimed_by_warp(u32 claims, int, int i) {
    int item = 0;
    if (threadIdx.x % 32 == 0) item = claimed(claims, 0, i);
    return __shfl_sync(0xffffffff, item, 0);
}

// A step of both operands: 64 classes of 128 rows of E, and this block's half of as many rows of weight.
__device__ __forceinline__ void fetch_stage(const Arguments&, const TensorMap* e_map, const TensorMap* w_map, u32 to_a, u32 to_b,
                                            int m, int n, int k, u32 rank, u32 bar) {
    fetch(to_a, e_map, k, m, bar);
    const int half = rank * DEPTH / 2;
    FOR(b, BN / 64) fetch_for_both(to_b + (b * DEPTH + half) * 128, w_map, n + 64 * b, k + half, bar);
}

__device__ __forceinline__ int* arrived_at(const Arguments& a, const Tile& t, u32 rank) {
    const int columns = (a.columns + BN - 1) / BN;
    return a.arrived + (t.m / BM + rank) * columns + t.n / BN;
}

__device__ __forceinline__ void prepare(const Arguments&, float (&)[2][BN / 2], int, int, int) {}

__device__ __forceinline__ void finish(const Arguments& a, const TensorMap* p_map, float (&acc)[2][BN / 2], const Tile& t,
                                       u32 rank, u32 staging, int warpgroup) {
    if (t.k > 0 && (threadIdx.x & 127) == 0) {
        const int due = a.before + t.k / a.part;
        int here;
        do
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(here) : "l"(arrived_at(a, t, rank)) : "memory");
        while (here < due);
        asm volatile("fence.proxy.async;" ::: "memory");
    }
    write_wide(p_map, acc, t.m + rank * BM, t.n, staging, warpgroup, t.k > 0);
}

__device__ __forceinline__ void announce(const Arguments& a, const Tile& t, u32 rank) {
    put_arrived();
    asm volatile("fence.proxy.async;\nred.release.gpu.global.add.s32 [%0], 1;" ::"l"(arrived_at(a, t, rank)) : "memory");
}
