// What is done row by row around the two products, on sm_90a: anchors, coefficients, dX, and the targets' part of dW.
//
// The same as the small kernels of anchored_kernels.py, which say what each is for; here because a launch costs the host a
// quarter of Triton's, and because all of them come from one compilation. H is a multiple of 8, and rows of x, weight and
// what has H columns begin on 16 bytes.

typedef unsigned int u32;
typedef long long i64;
typedef unsigned short bf16;  // its bits

struct Arguments {
    int N, H, V;
    int row0, rows;  // the chunk
    int samples;     // classes that a row without a target looks at for an anchor
    int tiles;       // of columns, each with its sums
    int marks;       // [marks] in `marked` to be cleared, chunks' `found` one after another
    const bf16 *x, *weight;
    i64 stride_x, stride_w;
    const float* bias;   // [V]
    const i64* target;   // [N], stride_t apart
    i64 stride_t;
    float *anchor, *raw;                      // [N]; raw: the target's logit before the epilogue
    float* target_logit;                      // [N]
    const float *class_sum, *shift;           // [H], [2]: for the rows' sums of logits
    float* sum_logits;                        // [N]
    const float *sums, *maxima;               // [tiles, part_stride]
    i64 part_stride;
    float* row_max;                           // [chunk rows]
    int *flag, *found, *marked;               // [chunk rows], [1 + pairs of row tiles]
    float* lse;                               // [N]
    const float *g_lse, *g_slope, *g_target, *g_sum;  // [N], each with its stride
    i64 stride_gl, stride_gs, stride_gt, stride_g;
    float *u, *d;                             // [chunk rows], [N]
    const float* product;                     // [chunk rows, H]: E @ weight but for the last `tail` classes
    const bf16* e;                            // [chunk rows, row_stride]
    i64 row_stride;
    int tail;
    float slope;                              // of an affine epilogue
    bf16 *dx, *xs;                            // [N, H], [chunk rows, H]
    float *dw, *db;                           // [V, H], [V]
    const int* key;                           // [N]: targets, sorted, V for none
    const i64 *order, *ends;                  // [N]: their rows; where a class's entries end
    const unsigned char* needed;              // [N], rows that count whatever their gradients are; null: none
    int* counts;                              // [N], 1: the row counts
    int* packed;                              // [N], the rows that count, in order; null: every row does
    int* counted;                             // [1], how many they are
    bf16* x_packed;                           // [chunk rows, x_apart], their x
    i64 x_apart;
};

#define INF __int_as_float(0x7f800000)

constexpr int PAIR = 256;             // rows that share a mark: a pair of row tiles
constexpr int DEPTH = 64;             // rows in one step of the product for dW
constexpr float SATURATED = 1.0e26f;  // see anchored_kernels.py
constexpr int LINE = 32 * 8;          // columns that a warp takes at a time

struct Eight {
    float v[8];
};

__device__ __forceinline__ float wide(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ Eight load(const bf16* from) {
    const uint4 p = *reinterpret_cast<const uint4*>(from);
    Eight r;
    const u32 q[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) r.v[2 * i] = wide(q[i] & 0xffff), r.v[2 * i + 1] = __uint_as_float(q[i] & 0xffff0000);
    return r;
}

__device__ __forceinline__ Eight load(const float* from) {
    const float4 p = reinterpret_cast<const float4*>(from)[0], q = reinterpret_cast<const float4*>(from)[1];
    return {{p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w}};
}

__device__ __forceinline__ void store(float* to, const Eight& r) {
    reinterpret_cast<float4*>(to)[0] = make_float4(r.v[0], r.v[1], r.v[2], r.v[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(r.v[4], r.v[5], r.v[6], r.v[7]);
}

__device__ __forceinline__ void store(bf16* to, const Eight& r) {
    u32 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(q[i]) : "f"(r.v[2 * i + 1]), "f"(r.v[2 * i]));
    *reinterpret_cast<uint4*>(to) = make_uint4(q[0], q[1], q[2], q[3]);
}

// The sum over a warp, in every lane.
__device__ __forceinline__ float all_sum(float x) {
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(0xffffffff, x, i);
    return x;
}

template <typename T> __device__ __forceinline__ float dot(const bf16* x, const T* y, int H, int lane) {
    float total = 0.0f;
    for (int h = lane * 8; h < H; h += LINE) {
        const Eight a = load(x + h), b = load(y + h);
#pragma unroll
        for (int i = 0; i < 8; ++i) total += a.v[i] * b.v[i];
    }
    return all_sum(total);
}

// The target's class, -1 where there is none (or one that the host's check will report).
__device__ __forceinline__ int column(const Arguments& a, int row) {
    if (!a.target) return -1;
    const i64 t = a.target[row * a.stride_t];
    return t >= 0 && t < a.V ? (int)t : -1;
}

__device__ __forceinline__ float at(const float* of, i64 row, i64 stride) { return of ? of[row * stride] : 0.0f; }

// Where a chunk's rows are, and how many it has: those that count come first.
__device__ __forceinline__ int row_at(const Arguments& a, int place) { return a.packed ? a.packed[place] : place; }
__device__ __forceinline__ int rows_here(const Arguments& a) {
    return a.packed ? max(min(a.rows, *a.counted - a.row0), 0) : a.rows;
}

// A warp for each row of x: does it count? It does, too, if its logits might be infinite: zero times that is not zero.
// lse: null where it is known, and not a result.
constexpr u32 LARGE = (127 + 40) << 7;  // the bits of 2^40 in bf16

extern "C" __global__ void __launch_bounds__(256) lce_count(const __grid_constant__ Arguments a) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= a.N) return;
    bool counts = a.needed && a.needed[row];
    counts |= at(a.g_lse, row, a.stride_gl) != 0.0f || at(a.g_slope, row, a.stride_gs) != 0.0f ||
              at(a.g_target, row, a.stride_gt) != 0.0f || at(a.g_sum, row, a.stride_g) != 0.0f;
    for (int h = lane * 8; h < a.H && !counts; h += LINE) {
        const uint4 p = *reinterpret_cast<const uint4*>(a.x + row * a.stride_x + h);
        const u32 q[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) counts |= (q[i] & 0x7fff) > LARGE || (q[i] >> 16 & 0x7fff) > LARGE;
    }
    counts = __any_sync(0xffffffff, counts);
    if (lane == 0) {
        a.counts[row] = counts;
        if (!counts) {  // its statistics are zeros
            if (a.lse) a.lse[row] = 0.0f;
            if (a.target_logit) a.target_logit[row] = 0.0f;
            if (a.sum_logits) a.sum_logits[row] = 0.0f;
        }
    }
}

// One block: each of its warps takes as many rows, and puts those that count behind those of the warps before it.
extern "C" __global__ void __launch_bounds__(1024) lce_pack(const __grid_constant__ Arguments a) {
    __shared__ int before_warp[32];
    constexpr u32 ALL = 0xffffffff;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, each = (a.N + 1023) / 1024 * 32;
    const int first = min(warp * each, a.N), end = min(first + each, a.N);
    int mine = 0;
#pragma unroll 8
    for (int row = first + lane; row - lane < end; row += 32) mine += row < end && a.counts[row];
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) mine += __shfl_xor_sync(ALL, mine, i);
    if (lane == 0) before_warp[warp] = mine;
    __syncthreads();
    if (warp == 0) {
        int sum = before_warp[lane];
#pragma unroll
        for (int i = 1; i < 32; i <<= 1) {
            const int below = __shfl_up_sync(ALL, sum, i);
            if (lane >= i) sum += below;
        }
        before_warp[lane] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) *a.counted = before_warp[31];
    int place = before_warp[warp] - mine;
#pragma unroll 4
    for (int row = first + lane; row - lane < end; row += 32) {
        const bool counts = row < end && a.counts[row];
        const u32 here = __ballot_sync(ALL, counts);
        if (counts) a.packed[place + __popc(here & ((1u << lane) - 1))] = row;
        place += __popc(here);
    }
}

// A warp for each row of a chunk: x of the rows that count, and zeros up to the end of their last pair of row tiles.
extern "C" __global__ void __launch_bounds__(256) lce_gather(const __grid_constant__ Arguments a) {
    const int local = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, rows = rows_here(a);
    if (local >= a.rows || local >= (max(rows, a.row0 == 0) + PAIR - 1) / PAIR * PAIR) return;
    const bf16* from = local < rows ? a.x + row_at(a, a.row0 + local) * a.stride_x : nullptr;
    for (int h = lane * 8; h < a.H; h += LINE)
        *reinterpret_cast<uint4*>(a.x_packed + local * a.x_apart + h) =
            from ? *reinterpret_cast<const uint4*>(from + h) : make_uint4(0, 0, 0, 0);
}

// A warp for each row of x.
extern "C" __global__ void __launch_bounds__(256) lce_anchors(const __grid_constant__ Arguments a) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.marks; i += gridDim.x * blockDim.x) a.marked[i] = 0;
    const int place = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (place >= (a.packed ? *a.counted : a.N)) return;
    const int row = row_at(a, place);
    const int t = column(a, row);
    const bf16* x = a.x + row * a.stride_x;
    float anchor = -INF, raw = 0.0f;
    for (int i = 0; i < (t >= 0 ? 1 : a.samples); ++i) {
        const int v = t >= 0 ? t : (a.V + a.samples - 1) / a.samples * i % a.V;
        raw = dot(x, a.weight + v * a.stride_w, a.H, lane);
        if (a.bias) raw += a.bias[v];
        float y = raw, slope = 1.0f;
        epilogue(y, slope);
        anchor = y == y ? fmaxf(anchor, y) : y;
    }
    if (lane == 0) {
        a.anchor[row] = anchor;
        a.raw[row] = raw;
        if (a.target_logit) a.target_logit[row] = t >= 0 ? anchor : 0.0f;
    }
    if (a.sum_logits) {
        const float inner = dot(x, a.class_sum, a.H, lane);
        float shift = 0.0f, slope = 1.0f;
        epilogue(shift, slope);
        // sum over v of c_v (slope (x w_v + b_v) + shift), with the sums of c_v b_v and of c_v beforehand
        if (lane == 0) a.sum_logits[row] = slope * (inner + a.shift[0]) + shift * a.shift[1];
    }
}

// A block for 32 rows: each of its warps takes some of the column tiles.
constexpr int WARPS = 16;

template <typename F> __device__ __forceinline__ float over_tiles(const Arguments& a, const float* of, float start, F f) {
    __shared__ float part[WARPS][33];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, local = blockIdx.x * 32 + lane;
    float r = start;
    if (local < rows_here(a)) {
#pragma unroll 4
        for (int tile = warp; tile < a.tiles; tile += WARPS) r = f(r, of[tile * a.part_stride + local]);
    }
    part[warp][lane] = r;
    __syncthreads();
    r = start;
    for (int i = 0; i < WARPS; ++i) r = f(r, part[i][lane]);
    __syncthreads();
    return r;
}

// known: lse is given, and was the anchor. redo: only rows whose flag is up, with their largest logit as the anchor.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    lce_normalise(const __grid_constant__ Arguments a, int known, int redo) {
    if (redo && a.found[0] == 0) return;
    const int local = blockIdx.x * 32 + threadIdx.x % 32;
    const bool inside = local < rows_here(a), writes = inside && threadIdx.x < 32;
    if (!__syncthreads_or(inside)) return;
    const int row = inside ? row_at(a, a.row0 + local) : 0, t = column(a, row);
    const float y_t = a.anchor[row];
    float lse, rest = 0.0f, total = 0.0f, at_target = 0.0f;
    if (known) {
        lse = a.lse[row];
    } else {
        rest = over_tiles(a, a.sums, 0.0f, [](float x, float y) { return x + y; });
        float anchor = y_t;
        if (redo && inside && a.flag[local] > 0) {
            const float high = fmaxf(anchor, a.row_max[local]);
            anchor = fabsf(high) < INF ? high : 0.0f;
        }
        at_target = t >= 0 ? expf(y_t - anchor) : 0.0f;
        total = rest + at_target;
        if (!redo) {
            // A row without a target has its anchor among what was summed.
            const int flag = inside && !(total <= SATURATED && total > 0.0f);
            if (writes) a.flag[local] = flag;
            if (__syncthreads_or(flag)) {
                const float high = over_tiles(a, a.maxima, -INF, [](float x, float y) { return fmaxf(x, y); });
                if (writes) a.row_max[local] = high;
                if (threadIdx.x == 0) a.found[0] = a.found[1 + blockIdx.x * 32 / PAIR] = 1;
            }
        }
        lse = anchor + logf(total);
        if (writes) a.lse[row] = lse;
    }
    if (!a.d || !writes) return;
    const float g_t = at(a.g_target, row, a.stride_gt);
    float g = at(a.g_lse, row, a.stride_gl);
    if (a.g_slope) g += a.g_slope[row * a.stride_gs] * lse;
    // g p_t + g_t with p_t = 1 - rest / total: nothing cancels where g_t = -g.
    const float d = known ? g * expf(y_t - lse) + g_t : (g + g_t) * (at_target / total) + g_t * (rest / total);
    float z = a.raw[row], slope = 1.0f;
    epilogue(z, slope);
    a.u[local] = known ? g : g / total;
    a.d[row] = t >= 0 ? d * slope : 0.0f;
}

// A warp for each row of the chunk: dX = u (E weight) + d weight[target] (+ the sum's term), and xs = u x for dW.
extern "C" __global__ void __launch_bounds__(256) lce_spread(const __grid_constant__ Arguments a) {
    const int local = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, rows = rows_here(a);
    if (local >= a.rows) return;
    if (local >= rows) {
        // The product for dW reads whole steps of its inner dimension: E is zero there, and this must be finite.
        if (a.xs && local < (max(rows, a.row0 == 0) + DEPTH - 1) / DEPTH * DEPTH)
            for (int h = lane * 8; h < a.H; h += LINE) store(a.xs + (i64)local * a.H + h, Eight{});
        return;
    }
    const int row = row_at(a, a.row0 + local), t = column(a, row);
    const float u = a.u[local], d = a.d[row], g = at(a.g_sum, row, a.stride_g) * a.slope;
    for (int h = lane * 8; h < a.H; h += LINE) {
        if (a.xs) {
            Eight x = load(a.x + row * a.stride_x + h);
#pragma unroll
            for (int i = 0; i < 8; ++i) x.v[i] *= u;
            store(a.xs + (i64)local * a.H + h, x);
        }
        if (!a.dx) continue;
        Eight r = load(a.product + (i64)local * a.H + h);
        for (int v = a.V - a.tail; v < a.V; ++v) {
            const float e = wide(a.e[local * a.row_stride + v]);
            const Eight w = load(a.weight + v * a.stride_w + h);
#pragma unroll
            for (int i = 0; i < 8; ++i) r.v[i] += e * w.v[i];
        }
        const Eight w = t >= 0 ? load(a.weight + t * a.stride_w + h) : Eight{};
        const Eight c = a.g_sum ? load(a.class_sum + h) : Eight{};
#pragma unroll
        for (int i = 0; i < 8; ++i) r.v[i] = r.v[i] * u + d * w.v[i] + g * c.v[i];
        store(a.dx + (i64)row * a.H + h, r);
    }
}

// Eight of the sorted targets, a warp for each, and LINE columns: the warp of a class's first entry adds the whole class to
// dW, and to db. A class of more than LONG entries is the whole block's: only the last class that begins in a block can be so long.
constexpr int ENTRIES = 8, LONG = 32, AHEAD = 4;

// Every `step`-th of the entries first ... end: the sum of d x for eight columns, and that of d.
__device__ __forceinline__ void add_entries(const Arguments& a, int first, int end, int step, int h, Eight& sum,
                                            float& d_sum) {
    for (int i = first; i < end; i += step * AHEAD) {
        float d[AHEAD];
        Eight x[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const int at = i + j * step;
            const i64 row = at < end ? a.order[at] : -1;
            d[j] = row >= 0 ? a.d[row] : 0.0f;
            x[j] = row >= 0 && h < a.H ? load(a.x + row * a.stride_x + h) : Eight{};
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            d_sum += d[j];
#pragma unroll
            for (int k = 0; k < 8; ++k) sum.v[k] += d[j] * x[j].v[k];
        }
    }
}

__device__ __forceinline__ void add_class(const Arguments& a, int v, int h, Eight sum, float d_sum) {
    if (h < a.H) {
        float* to = a.dw + (i64)v * a.H + h;
        const Eight old = load(to);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum.v[k] += old.v[k];
        store(to, sum);
    }
    if (a.db && h == 0) a.db[v] += d_sum;
}

extern "C" __global__ void __launch_bounds__(32 * ENTRIES) lce_collect(const __grid_constant__ Arguments a) {
    __shared__ __align__(16) float part[ENTRIES][LINE];
    __shared__ float part_d[ENTRIES];
    __shared__ int shared_first, shared_end;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pieces = (a.H + LINE - 1) / LINE;
    const int entry = blockIdx.x / pieces * ENTRIES + warp, h = blockIdx.x % pieces * LINE + lane * 8;
    const int v = entry < a.N ? a.key[entry] : a.V;
    const bool begins = v < a.V && (entry == 0 || a.key[entry - 1] != v);
    const int end = begins ? (int)a.ends[entry] : 0;
    const bool is_long = begins && end - entry > LONG;
    if (is_long) shared_first = entry, shared_end = end;
    const bool any = __syncthreads_or(is_long);
    Eight sum = {};
    float d_sum = 0.0f;
    if (begins && !is_long) {
        add_entries(a, entry, end, 1, h, sum, d_sum);
        add_class(a, v, h, sum, d_sum);
    }
    if (!any) return;
    sum = {}, d_sum = 0.0f;
    add_entries(a, shared_first + warp, shared_end, ENTRIES, h, sum, d_sum);
    store(part[warp] + lane * 8, sum);
    if (lane == 0) part_d[warp] = d_sum;
    __syncthreads();
    if (warp > 0) return;
    for (int w = 1; w < ENTRIES; ++w) {
        const Eight more = load(part[w] + lane * 8);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum.v[k] += more.v[k];
        d_sum += part_d[w];
    }
    add_class(a, a.key[shared_first], h, sum, d_sum);
}
