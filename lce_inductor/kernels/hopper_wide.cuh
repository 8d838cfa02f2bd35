// Results in fp32: for the two products whose result is a sum over chunks, or over parts of the inner dimension.

constexpr int SLICE = 32;                      // columns that leave together: 128 bytes
constexpr int SLICE_BYTES = BM * SLICE * 4;
constexpr int RING = 3;                        // slices on their way out
constexpr int WIDE_BYTES = RING * SLICE_BYTES;

// A tile by way of the staging buffer; accumulate: added to what is there, by the copy engine, in L2.
__device__ __forceinline__ void write_wide(const TensorMap* map, float (&acc)[2][BN / 2], int first_m, int first_n, u32 staging,
                                           int warpgroup, bool accumulate) {
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
            if (accumulate)
                add(map, first_n + SLICE * s, first_m, slice);
            else
                put(map, first_n + SLICE * s, first_m, slice);
            put_end();
        }
    }
    if (thread == 0) put_wait<0>();
}
