// The first product: E[n, v] = exp(x_n . w_v - anchor_n)      x [N, H], weight [V, H]; E [chunk rows, row_stride]
//
// What the host defines: epilogue() (text), HAS_BIAS, HAS_STEPS, HAS_TARGET, and any of STORE (write E), SUM (write sums
// and maxima over a tile's columns), REDO (only pairs of row tiles with a saturated row, with new anchors for those rows).
// With STORE, SUM and PLAIN it is the logits themselves that are written, rounded to bf16 or, with HALF, to fp16; sums and
// maxima are of what is written, the exponentials in a sum below the maximum beside it. With STORE and GRADIENT it is the
// gradient of the logits, where lse is known; where they are of a block of classes, so are bias and class_weight. HAS_SUM:
// it comes from the sum of logits as well.

constexpr bool TRANSPOSED_A = false, TRANSPOSED_B = false;  // both operands are K-major
constexpr int BOX_BYTES = BM * 128;       // a part of E on its way out: 64 columns
constexpr int STAGING_BYTES = STORE ? BN / 64 * BOX_BYTES : 0;

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
    int x_row0;                        // where the chunk begins in what its x is fetched from
    const int* order;                  // [N], the rows in the chunks' order; null: as they are
    const int* counted;                // how many of them count; null: all
    int class0;                        // the block's first class, which targets are counted from
    const float *lse, *g_lse, *g_target, *g_sum;  // [N]
    const float* class_weight;         // [V], of the sum; null: ones
};

__device__ __forceinline__ int rows_of(const Arguments& a) {
    return PLAIN || GRADIENT ? a.rows : rows_to_write(a.rows, a.row0, a.counted);
}
__device__ __forceinline__ int inner_of(const Arguments& a) { return a.inner; }
__device__ __forceinline__ bool nothing_to_do(const Arguments& a) { return (REDO && a.found[0] == 0) || rows_of(a) == 0; }
__device__ __forceinline__ bool wanted(const Arguments& a, int m) { return !REDO || a.found[1 + m / (2 * BM)] != 0; }

// A step of both operands: 128 rows of x, and this block's half of BN classes.
__device__ __forceinline__ void fetch_stage(const Arguments& a, const TensorMap* x_map, const TensorMap* w_map, u32 to_a,
                                            u32 to_b, int m, int n, int k, u32 rank, u32 bar) {
    fetch(to_a, x_map, k, a.x_row0 + m, bar);
    fetch_for_both(to_b + rank * B_BYTES / 2, w_map, k, n + rank * BN / 2, bar);
}

constexpr float LOG2E = 1.4426950408889634f;

// 64 rows of the tile, of which this thread has two: `acc` to E, bf16 pairs in its first half, the sums of E and
// the largest logits. shift: the rows' anchors times LOG2E.
// ASIDE: some entries do not count, those at `out` (from this thread's first column) and those beyond the last column.
template <bool ASIDE>
__device__ __forceinline__ void exponentials(const Arguments& a, float (&acc)[BN / 2], const float (&shift)[2],
                                             const float* bias, const int (&out)[2], float (&sum)[2], float (&high)[2],
                                             int first_v, int lane) {
    const int first_column = first_v + 2 * (lane & 3);
    FOR(j, BN / 8) {
        float2 added = {0.0f, 0.0f};
        if (HAS_BIAS) added = *(const float2*)(bias + 8 * j);
        FOR(h, 2) {
            float e[2];
            FOR(c, 2) {
                float z = acc[4 * j + 2 * h + c], slope = 1.0f;
                if (HAS_BIAS) z += c ? added.y : added.x;
                if (HAS_STEPS) epilogue(z, slope);
                if (ASIDE) z = minus_infinity_if(8 * j + c == out[h] || first_column + 8 * j + c >= a.columns, z);
                // One rounding of the anchor more than z - anchor has, as large as that of lse itself.
                e[c] = exp2_fast(fmaf(z, LOG2E, -shift[h]));
                if (SUM) {
                    sum[h] += e[c];
                    high[h] = fmaxf(high[h], z);
                }
                if (HAS_STEPS) e[c] *= slope;
            }
            if (STORE) acc[2 * j + h] = __uint_as_float(bf16_pair(e[0], e[1]));
        }
    }
}

__device__ __forceinline__ u32 pack(float low, float high) {
    if (!HALF) return bf16_pair(low, high);
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float unpack(u32 pair, int c) {
    if (!HALF) return __uint_as_float(c ? pair & 0xffff0000 : pair << 16);
    float z;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\n" "cvt.f32.f16 %0, low;\n}" : "=f"(z) : "r"(c ? pair >> 16 : pair));
    return z;
}

// 64 rows of the tile as they are stored: `acc` to packed pairs in its first half, the largest logits, and the sums of the
// exponentials below them. Without finite ones nothing is subtracted, as in logsumexp.
template <bool ASIDE>
__device__ __forceinline__ void plain(const Arguments& a, float (&acc)[BN / 2], float (&sum)[2], float (&high)[2], int first_v,
                                      int lane) {
    const int first_column = first_v + 2 * (lane & 3);
    auto stored = [&](int j, int h, int c) {
        const float z = unpack(__float_as_uint(acc[2 * j + h]), c);
        return ASIDE ? minus_infinity_if(first_column + 8 * j + c >= a.columns, z) : z;
    };
    FOR(j, BN / 8) FOR(h, 2) {
        acc[2 * j + h] = __uint_as_float(pack(acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1]));
        FOR(c, 2) high[h] = fmaxf(high[h], stored(j, h, c));
    }
    FOR(j, BN / 4) asm volatile("" : "+f"(acc[j]));  // unpacked once more, not kept unpacked: there is no room
    FOR(h, 2) {
        FOR(i, 2) high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffff, high[h], 1 << i));
        const float base = fabsf(high[h]) < INF ? high[h] * LOG2E : 0.0f;
        FOR(j, BN / 8) FOR(c, 2) sum[h] += exp2_fast(fmaf(stored(j, h, c), LOG2E, -base));
    }
}

// A number of each column of the tile by way of shared memory, from this thread's first column on. values: null for ones.
// WHICH: there may be several.
template <int WHICH>
__device__ __forceinline__ const float* of_columns(const Arguments& a, const float* values, int first_v, int warpgroup) {
    __shared__ float tile[2][BN];
    warpgroup_sync(warpgroup);  // the tile before may still be reading it
    for (int i = threadIdx.x & 127; i < BN; i += 128)
        tile[warpgroup][i] = !values ? 1.0f : first_v + i < a.columns ? values[first_v + i] : 0.0f;
    warpgroup_sync(warpgroup);
    return tile[warpgroup] + 2 * (threadIdx.x & 3);
}

struct RowGradient {
    float lse, hidden, u, s, d;  // the gradients of lse, of the sum, and of the logit at the target
    int out;                     // where that is, from this thread's first column; -1: not in this tile
};

// 64 rows of the tile: `acc` to slope (u exp(z - lse) + s c + d at the target), as pairs in its first half. The target's
// logit is as exact as lse is, so that nothing is lost where its probability is near one.
// AT_TARGET: one of these rows has its target here.
template <bool AT_TARGET>
__device__ __forceinline__ void gradients(float (&acc)[BN / 2], const RowGradient (&row)[2], const float* bias,
                                          const float* class_weight) {
    FOR(j, BN / 8) {
        float2 added = {0.0f, 0.0f}, weight = {0.0f, 0.0f};
        if (HAS_BIAS) added = *(const float2*)(bias + 8 * j);
        if (HAS_SUM) weight = *(const float2*)(class_weight + 8 * j);
        FOR(h, 2) {
            float g[2];
            FOR(c, 2) {
                float z = acc[4 * j + 2 * h + c], slope = 1.0f;
                if (HAS_BIAS) z += c ? added.y : added.x;
                if (HAS_STEPS) epilogue(z, slope);
                g[c] = row[h].u * exp2_fast((z - row[h].lse) * LOG2E);
                // As in rows.py: a masked class has no gradient, where zero times an infinite one would be NaN.
                if (HAS_BIAS && z == row[h].hidden) g[c] = 0.0f;
                if (HAS_SUM) g[c] = fmaf(row[h].s, c ? weight.y : weight.x, g[c]);
                if (AT_TARGET) g[c] += 8 * j + c == row[h].out ? row[h].d : 0.0f;
                if (HAS_STEPS) g[c] *= slope;
            }
            acc[2 * j + h] = __uint_as_float(pack(g[0], g[1]));
        }
    }
}

// The gradient of the logits, packed in the first half of `acc`.
__device__ __forceinline__ void prepare_gradients(const Arguments& a, float (&acc)[2][BN / 2], int first_n, int first_v,
                                                  const float* bias, int warpgroup) {
    const int warp = (threadIdx.x & 127) / 32, lane = threadIdx.x % 32;
    const float* weight = HAS_SUM ? of_columns<1>(a, a.class_weight, first_v, warpgroup) : nullptr;
    FOR(m, 2) {
        RowGradient here[2];
        bool at_target = false;
        FOR(h, 2) {
            const int local = first_n + 64 * m + 16 * warp + lane / 4 + 8 * h;
            const bool inside = local < a.rows;  // what is written of a row that is not there goes nowhere
            const long long row = inside ? (long long)a.row0 + local : 0;
            RowGradient& r = here[h];
            r = {a.lse[row], 0.0f, a.g_lse[row], 0.0f, 0.0f, -1};
            if (HAS_BIAS) r.hidden = fabsf(r.lse) < INF ? -INF : __int_as_float(0x7fffffff);
            if (HAS_SUM) r.s = a.g_sum[row];
            if (HAS_TARGET && inside) {
                const long long t = a.target[row * a.stride_t] - a.class0 - first_v;
                if (t >= 0 && t < min(BN, a.columns - first_v)) {
                    r.out = (int)t - 2 * (lane & 3);
                    r.d = a.g_target[row];
                    at_target = true;
                }
            }
        }
        if (__any_sync(0xffffffff, at_target))
            gradients<true>(acc[m], here, bias, weight);
        else
            gradients<false>(acc[m], here, bias, weight);
    }
}

// E, packed in the first half of `acc`, its sums and the largest logits: all that does not need the staging buffer.
__device__ __forceinline__ void prepare(const Arguments& a, float (&acc)[2][BN / 2], int first_n, int first_v,
                                        int warpgroup) {
    const int thread = threadIdx.x & 127, warp = thread / 32, lane = thread % 32;
    const float* bias = HAS_BIAS ? of_columns<0>(a, a.bias, first_v, warpgroup) : nullptr;
    if (GRADIENT) return prepare_gradients(a, acc, first_n, first_v, bias, warpgroup);
    float shift[2][2];
    int out[2][2];
    bool aside[2];
    const int rows = PLAIN ? a.rows : rows_that_count(a.rows, a.row0, a.counted);
    FOR(m, 2) {
        aside[m] = first_v + BN > a.columns;
        if (!PLAIN) FOR(h, 2) {
            const int local = first_n + 64 * m + 16 * warp + lane / 4 + 8 * h;
            const bool inside = local < rows;
            long long row = (long long)a.row0 + local;
            if (a.order && inside) row = a.order[row];
            // Of a row that is not there E is zero: the product for dW may read it.
            float anchor = inside ? a.anchor[row] : INF;
            if (REDO && inside && a.flag[local] > 0) {
                const float largest = fmaxf(anchor, a.row_max[local]);
                // With an infinite anchor, exp(z) itself is as in logsumexp.
                anchor = fabsf(largest) < INF ? largest : 0.0f;
            }
            shift[m][h] = anchor * LOG2E;
            out[m][h] = -1;
            if (HAS_TARGET && inside) {
                // The target's own entry is known better than bf16 can hold it: it stays out.
                const long long t = a.target[row * a.stride_t] - first_v;
                if (t >= 0 && t < BN) {
                    out[m][h] = (int)t - 2 * (lane & 3);
                    aside[m] = true;
                }
            }
        }
    }
    FOR(m, 2) {
        float sum[2] = {0.0f, 0.0f}, high[2] = {-INF, -INF};
        if (PLAIN && first_v + BN > a.columns)
            plain<true>(a, acc[m], sum, high, first_v, lane);
        else if (PLAIN)
            plain<false>(a, acc[m], sum, high, first_v, lane);
        else if (__any_sync(0xffffffff, aside[m]))
            exponentials<true>(a, acc[m], shift[m], bias, out[m], sum, high, first_v, lane);
        else
            exponentials<false>(a, acc[m], shift[m], bias, out[m], sum, high, first_v, lane);
        if (SUM) {
            FOR(h, 2) {
                FOR(i, 2) {
                    sum[h] += __shfl_xor_sync(0xffffffff, sum[h], 1 << i);
                    high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffff, high[h], 1 << i));
                }
                const int local = first_n + 64 * m + 16 * warp + lane / 4 + 8 * h;
                if (lane % 4 == 0 && local < rows) {
                    const long long at = (long long)(first_v / BN) * a.part_stride + local;
                    a.sums[at] = sum[h];
                    a.maxima[at] = high[h];
                }
            }
        }
    }
}

// E by way of the staging buffer.
__device__ __forceinline__ void finish(const Arguments& a, const TensorMap* e_map, float (&acc)[2][BN / 2], const Tile& t,
                                       u32 rank, u32 staging, int warpgroup) {
    if (!STORE) return;
    const int first_n = t.m + rank * BM, first_v = t.n;
    const int thread = threadIdx.x & 127, warp = thread / 32, lane = thread % 32;
    FOR(m, 2) {
        const u32 row = staging + (64 * m + 16 * warp + (lane & 15)) * 128;
        FOR(j, BN / 16) {
            // Four 8 x 8 matrices: rows 0 and 8, then the next eight columns. Lane l gives the address of one line.
            const int chunk = 2 * j + (lane >> 4);
            const u32 to = row + chunk / 8 * BOX_BYTES + ((chunk % 8) ^ (lane & 7)) * 16;
            const float* e = acc[m] + 4 * j;
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                         "r"(__float_as_uint(e[0])), "r"(__float_as_uint(e[1])),
                         "r"(__float_as_uint(e[2])), "r"(__float_as_uint(e[3]))
                         : "memory");
        }
    }
    warpgroup_sync(warpgroup);
    if (thread == 0) {
        FOR(b, BN / 64) put(e_map, first_v + 64 * b, first_n, staging + b * BOX_BYTES);
        put_end();
        put_wait<0>();
    }
}
