// The second product: dW[v, h] (+)= sum over n of E[n, v] xs[n, h]      E [chunk rows, row_stride], xs [n, H]; dW [V, H] fp32
//
// The sums of chunks before are added by the copy engine, in L2, while the next tile is multiplied: nothing waits for them,
// and each is added to once a launch, so that the same inputs give the same bits.

constexpr bool TRANSPOSED_A = true, TRANSPOSED_B = true;  // both operands are M/N-major
constexpr int STAGING_BYTES = WIDE_BYTES;

struct Arguments {
    int rows, columns, inner;  // of the product: V, H, n
    int group;                 // pairs of row tiles that share columns
    int accumulate;            // 0: overwrite what is there
    int row0;                  // where the chunk begins
    const int* counted;        // how many rows of the call count; null: all
};

// Up to the end of their last step of DEPTH rows, E or xs is zero behind the rows that count.
__device__ __forceinline__ int rows_of(const Arguments& a) { return a.rows; }
__device__ __forceinline__ int inner_of(const Arguments& a) { return rows_to_write(a.inner, a.row0, a.counted); }
__device__ __forceinline__ bool nothing_to_do(const Arguments& a) { return inner_of(a) == 0; }
__device__ __forceinline__ bool wanted(const Arguments&, int) { return true; }

// A step of both operands: 64 rows of E for 128 classes, and this block's half of as many rows of xs.
__device__ __forceinline__ void fetch_stage(const Arguments&, const TensorMap* e_map, const TensorMap* xs_map, u32 to_a,
                                            u32 to_b, int m, int n, int k, u32 rank, u32 bar) {
    FOR(b, BM / 64) fetch(to_a + b * DEPTH * 128, e_map, m + 64 * b, k, bar);
    const int half = rank * DEPTH / 2;
    FOR(b, BN / 64) fetch_for_both(to_b + (b * DEPTH + half) * 128, xs_map, n + 64 * b, k + half, bar);
}

__device__ __forceinline__ void prepare(const Arguments&, float (&)[2][BN / 2], int, int, int) {}

__device__ __forceinline__ void finish(const Arguments& a, const TensorMap* dw_map, float (&acc)[2][BN / 2], const Tile& t,
                                       u32 rank, u32 staging, int warpgroup) {
    write_wide(dw_map, acc, t.m + rank * BM, t.n, staging, warpgroup, a.accumulate);
}
