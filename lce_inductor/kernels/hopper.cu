// out[m, n] = f(sum over k of A[m, k] B[n, k]) on sm_90a, for the large products of a head.
//
// Persistent blocks of three warpgroups in clusters of two blocks. One warp of the first warpgroup fetches operands;
// the other two warpgroups take whole tiles of 128 x BN in turns ("ping-pong"), so that what is done with one tile's sums
// runs beside the product of the next. The blocks of a cluster take two row tiles beside the same columns: each fetches
// half of B for both.
//
// hopper.py compiles this with NVRTC, behind hopper_common.cuh and one of hopper_logits.cuh, hopper_dx.cuh and hopper_dw.cuh,
// which say where the operands come from and what f is.

#ifndef PARTS  // each tile takes the whole inner dimension, and no cluster waits for another: tiles go round
#define CLAIMED 0
__device__ __forceinline__ void clear_claims(u32) {}
__device__ __forceinline__ int claim(const Arguments&) { return 0; }
__device__ __forceinline__ void publish(const Arguments&, u32, int, int, int) {}
__device__ __forceinline__ int claimed(u32, int before, int i) { return i ? before + gridDim.x / 2 : blockIdx.x / 2; }
__device__ __forceinline__ int claimed_by_warp(u32, int before, int i) { return claimed(0, before, i); }
__device__ __forceinline__ int splits(const Arguments&) { return 1; }
__device__ __forceinline__ Tile part_at(const Arguments& a, int tile, int pairs, int columns, int steps) {
    return tile_at(tile, pairs, columns, a.group, steps);
}
__device__ __forceinline__ void announce(const Arguments&, const Tile&, u32) {}
#endif

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    NAME(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
         const __grid_constant__ TensorMap out_map, const __grid_constant__ Arguments a) {
    if (nothing_to_do(a)) return;
    extern __shared__ unsigned char memory[];
    const u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    const u32 staging = base + STAGES * STAGE_BYTES;
    const u32 barriers = staging + STAGING_BYTES;
    // full[i], empty[i], then whose turn it is to write to the staging buffer, and to multiply
    auto full = [&](int i) { return barriers + 8 * i; };
    auto empty = [&](int i) { return barriers + 8 * (STAGES + i); };
    auto turn = [&](int i) { return barriers + 8 * (2 * STAGES + i); };
    auto go = [&](int i) { return barriers + 8 * (2 * STAGES + 2 + i); };
    const u32 claims = barriers + 8 * (2 * STAGES + 4);
    static_assert(1024 + STAGES * STAGE_BYTES + STAGING_BYTES + 8 * (2 * STAGES + 4 + CLAIMED) == SHARED_BYTES,
                  "shared memory is not what the host gives");

    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // for the compiler: the same in all of a warp
    const u32 rank = cluster_rank();
    if (threadIdx.x == 0) {
        FOR(i, STAGES) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), 2);  // the warpgroup that has read this stage, in either block
        }
        FOR(i, 2) barrier_init(turn(i), 1), barrier_init(go(i), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    clear_claims(claims);
    cluster_sync();

    const int pairs = (rows_of(a) + 2 * BM - 1) / (2 * BM), columns = (a.columns + BN - 1) / BN;
    const int steps = (inner_of(a) + DEPTH - 1) / DEPTH, count = pairs * columns * splits(a);

    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            u32 stage = 0, parity = 1;  // a fresh barrier counts as one whose odd phase is over
            if (rank == 0) publish(a, claims, 0, claim(a), count);
            for (int i = 0, tile = claimed(claims, 0, 0); tile < count; tile = claimed(claims, tile, ++i)) {
                const int ahead = rank == 0 ? claim(a) : 0;  // comes while this tile is fetched
                const Tile t = part_at(a, tile, pairs, columns, steps);
                if (!wanted(a, t.m)) continue;
                const int m = t.m + rank * BM;
#pragma unroll 1
                for (int k = t.k; k < t.k + t.steps; ++k) {
                    const u32 to_a = base + stage * STAGE_BYTES, to_b = to_a + A_BYTES;
                    barrier_wait(empty(stage), parity);
                    barrier_expect(full(stage), STAGE_BYTES);
                    fetch_stage(a, &a_map, &b_map, to_a, to_b, m, t.n, k * DEPTH, rank, full(stage));
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
                if (rank == 0) publish(a, claims, i + 1, ahead, count);
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int mine = group - 1, thread = threadIdx.x & 127;
        // Bytes to the next 16 of the inner dimension, and to the next 64 columns.
        constexpr u32 A16 = TRANSPOSED_A ? 16 * 128 : 16 * 2, A_APART = TRANSPOSED_A ? DEPTH * 128 : 0;
        constexpr u32 B16 = TRANSPOSED_B ? 16 * 128 : 16 * 2, B_APART = TRANSPOSED_B ? DEPTH * 128 : 0;
        u32 step = 0;   // stages before this tile, of both warpgroups
        int index = 0;  // tiles before this one, of both
        int i = 0;
        for (int tile = claimed_by_warp(claims, 0, 0); tile < count; tile = claimed_by_warp(claims, tile, ++i)) {
            const Tile t = part_at(a, tile, pairs, columns, steps);
            if (!wanted(a, t.m)) continue;
            if ((index++ & 1) != mine) {
                step += t.steps;
                continue;
            }
            // Turns alternate, and the first warpgroup's first one is free.
            const u32 own = ((index - 1) / 2 & 1) ^ (mine == 0);
            // Not zeroed, they would have to be kept from the tile before. The instruction needs no zeros: it is told to
            // overwrite.
            float acc[2][BN / 2];
            FOR(m, 2) FOR(i, BN / 2) acc[m][i] = 0.0f;
            // A barrier tells only whether the phase before this one is over: wait for the other's last stage first.
            barrier_wait(go(mine), own);
            u32 before = 0;
            for (int k = 0; k < t.steps; ++k, ++step) {
                const u32 stage = step % STAGES, from_a = base + stage * STAGE_BYTES, from_b = from_a + A_BYTES;
                barrier_wait(full(stage), step / STAGES & 1);
                wgmma_begin();
                FOR(i, DEPTH / 16) {
                    const u64 b = operand(from_b + i * B16, B_APART);
                    FOR(m, 2) wgmma_bn(acc[m], operand(from_a + m * 64 * 128 + i * A16, A_APART), b, (k | i) != 0);
                }
                wgmma_end();
                if (k > 0) {
                    wgmma_wait<1>();
                    if (thread < 2) barrier_arrive_at(empty(before), thread);
                }
                before = stage;
            }
            if (thread == 0) barrier_arrive(go(mine ^ 1));
            wgmma_wait<0>();
            FOR(m, 2) FOR(i, BN / 2) asm volatile("" : "+f"(acc[m][i])::"memory");
            if (thread < 2) barrier_arrive_at(empty(before), thread);
            prepare(a, acc, t.m + rank * BM, t.n, mine);
            if (STAGING_BYTES > 0) barrier_wait(turn(mine), own);
            finish(a, &out_map, acc, t, rank, staging, mine);
            if (STAGING_BYTES > 0 && thread == 0) barrier_arrive(turn(mine ^ 1));
            if (thread == 0) announce(a, t, rank);
        }
    }
    // Neither block goes while the other may still write to it.
    cluster_sync();
}
