// Tiles of the products on sm_90a, and what C++ has no words for: barriers, the copy engine, the matrix unit. hopper.py
// puts this file before the others, and before it BN (columns of a tile), STAGES and wgmma_bn() (the instruction).

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

struct Tile {
    int m, n;  // first row of the cluster's two row tiles, first column
    int k, steps;  // of the inner dimension: first step, and how many of DEPTH each
};

// Of the rows of a chunk, from `row0` on, those that count. The rows that count come first: all of the call's are before
// `counted`, or every row counts where that is null. Their number is nobody's on the host: what is launched is the same.
__device__ __forceinline__ int rows_that_count(int rows, int row0, const int* counted) {
    return counted ? max(min(rows, *counted - row0), 0) : rows;
}

// The same, and at least one of a first chunk's: what is read of its E has been written then, and dW too.
__device__ __forceinline__ int rows_to_write(int rows, int row0, const int* counted) {
    return max(rows_that_count(rows, row0, counted), row0 == 0);
}

// `group` pairs of row tiles at a time, so that both operands stay in L2.
__device__ __forceinline__ Tile tile_at(int tile, int pairs, int columns, int group, int steps) {
    int per_group = group * columns, first = tile / per_group * group;
    int size = min(pairs - first, group), inside = tile % per_group;
    return {(first + inside % size) * 2 * BM, inside / size * BN, 0, steps};
}

// --- instructions ------------------------------------------------------------------------------------------------

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

// Add fp32 to what is there.
__device__ __forceinline__ void add(const TensorMap* map, int inner, int outer, u32 from) {
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
                 "r"(inner), "r"(outer), "r"(from)
                 : "memory");
}

__device__ __forceinline__ void put_end() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the last PENDING groups of this thread have been read.
template <int PENDING> __device__ __forceinline__ void put_wait() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Until all of this thread's are where they were to go.
__device__ __forceinline__ void put_arrived() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// What the threads of a warpgroup have written to shared memory is there for all of them, and for the copy engine.
__device__ __forceinline__ void warpgroup_sync(int warpgroup) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (warpgroup == 0)
        asm volatile("bar.sync 1, 128;" ::: "memory");
    else
        asm volatile("bar.sync 2, 128;" ::: "memory");
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Matrix descriptor of an operand swizzled by 128 bytes (PTX ISA, wgmma). K-major: eight rows are 1024 bytes. M/N-major:
// eight steps of the inner dimension are, and the next 64 columns are `apart` bytes away.
__device__ __forceinline__ u64 operand(u32 address, u32 apart) {
    return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)(apart >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// A selection that stays one: what is done with z is not skipped, or each condition would have to wait for the one before.
__device__ __forceinline__ float minus_infinity_if(bool condition, float z) {
    asm("{\n.reg .pred p;\nsetp.ne.s32 p, %1, 0;\nselp.f32 %0, 0fFF800000, %0, p;\n}" : "+f"(z) : "r"((int)condition));
    return z;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float inverse_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
