// The first product of the anchored softmax on sm_90a; hopper.py compiles this with NVRTC and launches it.
//
//   E[n, v] = exp(x_n . w_v - anchor_n)      x [N, H], weight [V, H], both K-major; E [chunk rows, row_stride]
//
// Persistent blocks of three warpgroups in clusters of two blocks. One warp of the first warpgroup fetches operands;
// the other two warpgroups take whole tiles of 128 x BN in turns ("ping-pong"), so that the exponentials of one tile
// run beside the product of the next. The blocks of a cluster take two row tiles beside the same columns: each fetches
// half of the columns' weights for both.
//
// What the host defines: BN (tile columns), STAGES, wgmma_bn() and epilogue() (text), HAS_BIAS, HAS_STEPS, HAS_TARGET,
// and any of STORE (write E), SUM (write sums and maxima over a tile's columns), REDO (only pairs of row tiles with a
// saturated row, with new anchors for those rows).

#define FOR(i, n) _Pragma("unroll") for (int i = 0; i < (n); ++i)
#define INF __int_as_float(0x7f800000)

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

constexpr int BM = 128;                   // rows of a tile
constexpr int DEPTH = 64;                 // of the inner dimension in one stage: 128 bytes, a swizzled line
constexpr int A_BYTES = BM * DEPTH * 2;
constexpr int B_BYTES = BN * DEPTH * 2;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int BOX_BYTES = BM * 128;       // a part of E on its way out: 64 columns
constexpr int STAGING_BYTES = STORE ? BN / 64 * BOX_BYTES : 0;

// --- what the instruction set has no C++ for ---------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Without .release.cluster, which is a fence of the whole GPU, some 800 cycles: what it tells is that the products have
// read a stage, and they have when their wait returns.
__device__ __forceinline__ void barrier_arrive_at(u32 bar, u32 block) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(bar),
        "r"(block)
        : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra GONE;\n"
        "bra AGAIN;\n"
        "GONE:\n}" ::"r"(bar),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void fetch(u32 to, const TensorMap* map, int inner, int outer, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(inner), "r"(outer), "r"(bar)
        : "memory");
}

// To the same place, and the same barrier, of both blocks.
__device__ __forceinline__ void fetch_for_both(u32 to, const TensorMap* map, int inner, int outer, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(inner), "r"(outer), "r"(bar), "h"((unsigned short)3)
        : "memory");
}

__device__ __forceinline__ void put(const TensorMap* map, int inner, int outer, u32 from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(inner),
                 "r"(outer), "r"(from)
                 : "memory");
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Matrix descriptor of a K-major operand, swizzled by 128 bytes: eight rows are 1024 bytes (PTX ISA, wgmma).
__device__ __forceinline__ u64 operand(u32 address) {
    return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (address & 0x3ffff) >> 4;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// --- tiles --------------------------------------------------------------------------------------------------------

struct Tile {
    int m, n;  // first row of the cluster's two row tiles, first column
};

// `group` pairs of row tiles at a time, so that both operands stay in L2.
__device__ __forceinline__ Tile tile_at(int tile, int pairs, int columns, int group) {
    int per_group = group * columns, first = tile / per_group * group;
    int size = min(pairs - first, group), inside = tile % per_group;
    return {(first + inside % size) * 2 * BM, inside / size * BN};
}

struct Arguments {
    int rows, columns, inner;          // of the product: n, V, H
    int row0;                          // where the chunk begins in x and in what has N entries
    int group;                         // pairs of row tiles that share columns
    const float* anchor;               // [N]
    const float* bias;                 // [V]
    const long long* target;           // [N], stride_t apart
    long long stride_t;
    float* sums;                       // [column tiles, part_stride], of each row's E
    float* maxima;                     // the same, of each row's logits
    long long part_stride;
    const float* row_max;              // [chunk rows], of rows that are saturated
    const int* flag;                   // [chunk rows], 1: saturated
    const int* found;                  // [1 + pairs of row tiles], 1: has a saturated row; the first: any has
};

constexpr float LOG2E = 1.4426950408889634f;

// 64 rows of the tile, of which this thread has two: `acc` to E in the staging buffer, its sums and the largest logits.
// ASIDE: some entries do not count, those at `out` (from this thread's first column) and those beyond the last column.
template <bool ASIDE>
__device__ __forceinline__ void exponentials(const Arguments& a, const float (&acc)[BN / 2], const float (&anchor)[2],
                                             const int (&out)[2], float (&sum)[2], float (&high)[2], int first_v,
                                             u32 staging_row, int lane) {
    const int first_column = first_v + 2 * (lane & 3);
    FOR(j2, BN / 16) {
        u32 packed[4];
        FOR(j1, 2) {
            const int j = 2 * j2 + j1;
            float bias[2] = {0.0f, 0.0f};
            if (HAS_BIAS) {
                FOR(c, 2) {
                    const int v = first_column + 8 * j + c;
                    if (v < a.columns) bias[c] = a.bias[v];
                }
            }
            FOR(h, 2) {
                float e[2];
                FOR(c, 2) {
                    float z = acc[4 * j + 2 * h + c], slope = 1.0f;
                    if (HAS_BIAS) z += bias[c];
                    if (HAS_STEPS) epilogue(z, slope);
                    const bool aside = ASIDE && (8 * j + c == out[h] || first_column + 8 * j + c >= a.columns);
                    e[c] = aside ? 0.0f : exp2_fast((z - anchor[h]) * LOG2E);
                    if (SUM) {
                        sum[h] += e[c];
                        high[h] = aside ? high[h] : fmaxf(high[h], z);
                    }
                    if (HAS_STEPS) e[c] = e[c] == 0.0f ? 0.0f : e[c] * slope;
                }
                if (STORE) packed[2 * j1 + h] = bf16_pair(e[0], e[1]);
            }
        }
        if (STORE) {
            // Four 8 x 8 matrices: rows 0 and 8, then the next eight columns. Lane l gives the address of one line.
            const int chunk = 2 * j2 + (lane >> 4);
            const u32 to = staging_row + chunk / 8 * BOX_BYTES + ((chunk % 8) ^ (lane & 7)) * 16;
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(packed[0]),
                         "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                         : "memory");
        }
    }
}

__device__ __forceinline__ void logits_epilogue(const Arguments& a, float (&acc)[2][BN / 2], int first_n, int first_v,
                                                u32 staging) {
    const int thread = threadIdx.x & 127, warp = thread / 32, lane = thread % 32;
    FOR(m, 2) {
        float anchor[2], sum[2] = {0.0f, 0.0f}, high[2] = {-INF, -INF};
        int out[2];
        bool aside = first_v + BN > a.columns;
        const int first = first_n + 64 * m + 16 * warp + lane / 4;
        FOR(h, 2) {
            const int local = first + 8 * h;
            const bool inside = local < a.rows;
            const long long row = (long long)a.row0 + local;
            anchor[h] = inside ? a.anchor[row] : 0.0f;
            if (REDO && inside && a.flag[local] > 0) {
                const float largest = fmaxf(anchor[h], a.row_max[local]);
                // With an infinite anchor, exp(z) itself is as in logsumexp.
                anchor[h] = fabsf(largest) < INF ? largest : 0.0f;
            }
            out[h] = -1;
            if (HAS_TARGET && inside) {
                // The target's own entry is known better than bf16 can hold it: it stays out.
                const long long t = a.target[row * a.stride_t] - first_v;
                if (t >= 0 && t < BN) {
                    out[h] = (int)t - 2 * (lane & 3);
                    aside = true;
                }
            }
        }
        const u32 staging_row = staging + (64 * m + 16 * warp + (lane & 15)) * 128;
        // Epilogues are long; one copy of them is enough.
        if (HAS_BIAS || HAS_STEPS || __any_sync(0xffffffff, aside))
            exponentials<true>(a, acc[m], anchor, out, sum, high, first_v, staging_row, lane);
        else
            exponentials<false>(a, acc[m], anchor, out, sum, high, first_v, staging_row, lane);
        if (SUM) {
            FOR(h, 2) {
                FOR(i, 2) {
                    sum[h] += __shfl_xor_sync(0xffffffff, sum[h], 1 << i);
                    high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffff, high[h], 1 << i));
                }
                const int local = first + 8 * h;
                if (lane % 4 == 0 && local < a.rows) {
                    const long long at = (long long)(first_v / BN) * a.part_stride + local;
                    a.sums[at] = sum[h];
                    a.maxima[at] = high[h];
                }
            }
        }
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    logits(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
           const __grid_constant__ TensorMap e_map, const __grid_constant__ Arguments a) {
    if (REDO && a.found[0] == 0) return;
    extern __shared__ unsigned char memory[];
    const u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    const u32 staging = base + STAGES * STAGE_BYTES;
    const u32 barriers = staging + STAGING_BYTES;
    // full[i], empty[i], then whose turn it is to write to the staging buffer, and to multiply
    auto full = [&](int i) { return barriers + 8 * i; };
    auto empty = [&](int i) { return barriers + 8 * (STAGES + i); };
    auto turn = [&](int i) { return barriers + 8 * (2 * STAGES + i); };
    auto go = [&](int i) { return barriers + 8 * (2 * STAGES + 2 + i); };

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
    cluster_sync();

    const int pairs = (a.rows + 2 * BM - 1) / (2 * BM), columns = (a.columns + BN - 1) / BN;
    const int steps = (a.inner + DEPTH - 1) / DEPTH, count = pairs * columns;
    auto wanted = [&](Tile t) { return !REDO || a.found[1 + t.m / (2 * BM)] != 0; };

    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            u32 stage = 0, parity = 1;  // a fresh barrier counts as one whose odd phase is over
            for (int tile = blockIdx.x / 2; tile < count; tile += gridDim.x / 2) {
                const Tile t = tile_at(tile, pairs, columns, a.group);
                if (!wanted(t)) continue;
                const int m = t.m + rank * BM;
#pragma unroll 1
                for (int k = 0; k < steps; ++k) {
                    const u32 to_a = base + stage * STAGE_BYTES, to_b = to_a + A_BYTES;
                    barrier_wait(empty(stage), parity);
                    barrier_expect(full(stage), STAGE_BYTES);
                    fetch(to_a, &x_map, k * DEPTH, a.row0 + m, full(stage));
                    fetch_for_both(to_b + rank * B_BYTES / 2, &w_map, k * DEPTH, t.n + rank * BN / 2, full(stage));
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int mine = group - 1, thread = threadIdx.x & 127;
        constexpr u32 K16 = 32;  // bytes to the next 16 of the inner dimension
        u32 step = 0;   // stages before this tile, of both warpgroups
        int index = 0;  // tiles before this one, of both
        float acc[2][BN / 2];
        for (int tile = blockIdx.x / 2; tile < count; tile += gridDim.x / 2) {
            const Tile t = tile_at(tile, pairs, columns, a.group);
            if (!wanted(t)) continue;
            if ((index++ & 1) != mine) {
                step += steps;
                continue;
            }
            // Turns alternate, and the first warpgroup's first one is free.
            const u32 own = ((index - 1) / 2 & 1) ^ (mine == 0);
            // A barrier tells only whether the phase before this one is over: wait for the other's last stage first.
            barrier_wait(go(mine), own);
            u32 before = 0;
            for (int k = 0; k < steps; ++k, ++step) {
                const u32 stage = step % STAGES, from_a = base + stage * STAGE_BYTES, from_b = from_a + A_BYTES;
                barrier_wait(full(stage), step / STAGES & 1);
                wgmma_begin();
                FOR(i, DEPTH / 16) {
                    const u64 b = operand(from_b + i * K16);
                    FOR(m, 2) wgmma_bn(acc[m], operand(from_a + m * 64 * 128 + i * K16), b, (k | i) != 0);
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
            if (STORE) barrier_wait(turn(mine), own);
            logits_epilogue(a, acc, t.m + rank * BM, t.n, staging);
            if (STORE) {
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                if (mine == 0)
                    asm volatile("bar.sync 1, 128;" ::: "memory");
                else
                    asm volatile("bar.sync 2, 128;" ::: "memory");
                if (thread == 0) {
                    FOR(b, BN / 64) put(&e_map, t.n + 64 * b, t.m + rank * BM, staging + b * BOX_BYTES);
                    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
                    barrier_arrive(turn(mine ^ 1));
                }
            }
        }
    }
    // Neither block goes while the other may still write to it.
    cluster_sync();
}
