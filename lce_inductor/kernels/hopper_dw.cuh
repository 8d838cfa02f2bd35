// The second product: dW[v, h] (+)= sum over n of E[n, v] xs[n, h]      E [chunk rows, row_stride], xs [n, H]; dW [V, H] fp32
//
// The sums of chunks before are added by the copy engine, in L2, while the next tile is multiplied: nothing waits for them,
// and each is added to once a launch, so that the same inputs give the same bits.

constexpr bool TRANSPOSED = true;              // both operands are M/N-major
constexpr int SLICE = 32;                      // columns of dW that leave together: 128 bytes
constexpr int SLICE_BYTES = BM * SLICE * 4;
constexpr int RING = 3;                        // slices on their way out
constexpr int STAGING_BYTES = RING * SLICE_BYTES;

struct Arguments {
    int rows, columns, inner;  // of the product: V, H, n
    int group;                 // pairs of row tiles that share columns
    int accumulate;            // 0: overwrite what is there
};

__device__ __forceinline__ bool nothing_to_do(const Arguments&) { return false; }
__device__ __forceinline__ bool wanted(const Arguments&, int) { return true; }

// A step of both operands: 64 rows of E for 128 classes, and this block's half of as many rows of xs.
__device__ __forceinline__ void fetch_stage(const Arguments&, const TensorMap* e_map, const TensorMap* xs_map, u32 to_a,
                                            u32 to_b, int m, int n, int k, u32 rank, u32 bar) {
    FOR(b, BM / 64) fetch(to_a + b * DEPTH * 128, e_map, m + 64 * b, k, bar);
    const int half = rank * DEPTH / 2;
    FOR(b, BN / 64) fetch_for_both(to_b + (b * DEPTH + half) * 128, xs_map, n + 64 * b, k + half, bar);
}

__device__ __forceinline__ void prepare(const Arguments&, float (&)[2][BN / 2], int, int, int) {}

__device__ __forceinline__ void finish(const Arguments& a, const TensorMap* dw_map, float (&acc)[2][BN / 2], int first_v,
                                       int first_h, u32 staging, int warpgroup) {
    const int thread = threadIdx.x & 127, warp = thread / 32, lane = thread % 32;
    FOR(s, BN / SLICE) {
        const u32 slice = staging + s % RING * SLICE_BYTES;
        if (s >= RING) {
            if (thread == 0) put_wait<RING - 1>();
            warpgroup_sync(warpgroup);
        }
        FOR(m, 2) FOR(h, 2) {
            const int row = 64 * m + 16 * warp + 8 * h + lane / 4;
            FOR(j, SLICE / 8) {
                const int chunk = 2 * j + lane % 4 / 2, at = 4 * (SLICE / 8 * s + j) + 2 * h;
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(slice + row * 128 + (chunk ^ (row & 7)) * 16 +
                                                                     lane % 2 * 8),
                             "f"(acc[m][at]), "f"(acc[m][at + 1])
                             : "memory");
            }
        }
        warpgroup_sync(warpgroup);
        if (thread == 0) {
            if (a.accumulate)
                add(dw_map, first_h + SLICE * s, first_v, slice);
            else
                put(dw_map, first_h + SLICE * s, first_v, slice);
            put_end();
        }
    }
    if (thread == 0) put_wait<0>();
}
