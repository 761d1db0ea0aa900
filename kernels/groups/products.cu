// Products (2) to (6) of the column-group FFN on Hopper (sm_90a): one main loop, three ways to go over the tiles.
//
// h is divided into tiles of 128 tokens x 128 neurons, and only the kept tiles are stored, contiguously: tiles
// [P, 128, 128] bf16; tile p belongs to the block of tokens tile_block[p] and the group of neurons tile_group[p].
//
//   reduce_neurons   (2) y  = h W2^T, (5) dx = dy1 W1     a block of tokens sums over the groups that it keeps
//   sample           (3) dy1 = 2 sqrt(h) * (dy W2)        computed only where a tile exists, the factor in the epilogue
//   reduce_tokens    (4) dW2 = dy^T h, (6) dW1 = dy1^T x  a group of neurons sums over the blocks that keep it
//
// All of them multiply a 128 x 64 operand A by a 64 x 256 operand B, step by step, into a 128 x 256 tile of the output;
// a list gives the slab of each matrix that the next step reads. The loop is warp-specialised: one thread of the first
// warpgroup keeps STAGES steps in flight with the tensor memory accelerator (TMA); the other two warpgroups issue wgmma
// m64n256k16 on 64 rows each. The grid is persistent: while the consumers write a tile, the producer already loads the
// next one. Rows of tiles differ in length, so a cluster takes its next work from a counter, the longest rows first.
//
// A step moves 48 KB through L2 for 4.2 MFLOP, which L2 cannot supply to all SMs at full rate. The CTAs of a cluster
// compute neighbouring output tiles of the same row, so they need the same A: each CTA fetches its share of A and
// multicasts it to all. That is 40 KB a step in a cluster of two, and tensor cores and L2 are both near their limits.
//
// Shared memory holds an operand as rows of 64 elements (128 bytes, the TMA's swizzle-128B): K-major [rows][64 of K],
// or MN-major [64-wide chunk][64 rows of K][64 of M or N], which wgmma reads transposed.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;  // only moved and converted here

struct alignas(64) TensorMap {
    char bytes[128];
};

constexpr int CLUSTER = 2;
constexpr unsigned short EVERY_CTA = (1 << CLUSTER) - 1;
constexpr int TILE = 128;  // tokens and neurons in a tile of h
constexpr int BN = 256;    // columns of an output tile
constexpr int BK = 64;     // one step of the reduction: one row of the swizzle
constexpr int STAGES = 4;
constexpr int CHUNK = 64 * BK * 2;  // bytes of 64 rows of 64 elements
constexpr int A_BYTES = 2 * CHUNK;
constexpr int A_SHARE = A_BYTES / CLUSTER;
constexpr int B_BYTES = 4 * CHUNK;
constexpr int OUT_BYTES = 2 * 2 * CHUNK;  // two buffers of 64 x 64 for each consumer warpgroup
constexpr int WORK_SLOTS = 2;

// ---- PTX

__device__ __forceinline__ u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra out;\n"
        "bra again;\n"
        "out:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Arrive at the barrier of the same name in CTA `rank` of the cluster. Without .release.cluster, which waits for all of
// the thread's writes to global memory: what the arrival orders are reads by wgmma, and those are complete.
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Four words to shared memory of CTA `rank`, at whose barrier they count as 16 bytes arrived.
__device__ __forceinline__ void send(u32 to, u32 barrier, u32 rank, int4 v) {
    asm volatile(
        "{\n"
        ".reg .b32 remote, signal;\n"
        "mapa.shared::cluster.u32 remote, %0, %2;\n"
        "mapa.shared::cluster.u32 signal, %1, %2;\n"
        "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [signal], 16;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [remote], {%3, %4, %5, %6}, [signal];\n"
        "}\n" ::"r"(to),
        "r"(barrier), "r"(rank), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
        : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// L2 eviction priorities of a load.
constexpr u64 EVICT_NORMAL = 0x1000000000000000, EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000;

__device__ __forceinline__ void load(const TensorMap& map, u32 to, u32 barrier, u64 policy, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
        "%4}], [%2], "
        "%5;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void load(const TensorMap& map, u32 to, u32 barrier, u64 policy, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
        "%4, %5}], "
        "[%2], %6;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
        : "memory");
}

// To the same place in all CTAs of the cluster.
__device__ __forceinline__ void load_all(const TensorMap& map, u32 to, u32 barrier, u64 policy, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(EVERY_CTA), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void load_all(const TensorMap& map, u32 to, u32 barrier, u64 policy, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5}], [%2], %6, %7;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(EVERY_CTA), "l"(policy)
        : "memory");
}

// wgmma's descriptor of an operand in shared memory, swizzle-128B; offsets in bytes. `leading` separates chunks of 64
// along M or N (MN-major only), groups of 8 rows are 1024 bytes apart.
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define ACC8(i)                                                                                             \
    "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
        "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define ACC32(i) ACC8(i), ACC8(i + 8), ACC8(i + 16), ACC8(i + 24)

// acc [64, 256] = a [64, 16] b [16, 256], plus acc where `accumulate`; TA, TB: the operand is MN-major.
template <int TA, int TB>
__device__ __forceinline__ void wgmma(float (&acc)[128], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, p, 1, 1, %131, %132;\n"
        "}\n"
        : ACC32(0), ACC32(32), ACC32(64), ACC32(96)
        : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB));
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ float low_half(u32 both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high_half(u32 both) { return __uint_as_float(both & 0xFFFF0000u); }

// Not sqrtf, whose exact version leaves its fast path at zero, and h is mostly zeros.
__device__ __forceinline__ float root(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four 8 x 8 matrices to shared memory, a lane's `address` one row of one of them.
template <bool TRANSPOSED>
__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    if (TRANSPOSED)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                     "r"(b), "r"(c), "r"(d)
                     : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                     "r"(c), "r"(d)
                     : "memory");
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
}

// ---- the products

enum Walk { REDUCE_NEURONS, SAMPLE, REDUCE_TOKENS };

// Arguments of a launch; a field whose comment names products is read only by those.
struct Arguments {
    bf16* out;
    int* counter;            // zero at launch, and again at the end
    const int* start;        // REDUCE_NEURONS, SAMPLE: block b's tiles are start[b] to start[b + 1]
    const int* tile_group;   // REDUCE_NEURONS, SAMPLE
    const int* tile_block;   // REDUCE_TOKENS
    const int* group_tiles;  // REDUCE_TOKENS: [groups, blocks], the tiles of each group
    const int* group_count;  // REDUCE_TOKENS: the number of tiles of each group
    const int* group_order;  // REDUCE_TOKENS: groups, fullest first
    const int* row_order;    // REDUCE_NEURONS: output row of each token, or null
    int rows;                // rows of output tiles: blocks of tokens, or groups of neurons
    int strips;              // largest number of strips of output tiles in a row
    int together;            // rows whose tiles are computed at the same time, to share B in L2
    int tokens;              // T
    int width;               // d
    int leading;             // row pitch of out: d, or f where the output is transposed
    int blocks;              // blocks of tokens
};

// A strip of neighbouring output tiles, one for each CTA of the cluster.
struct Work {
    int row;    // block of tokens or group of neurons; -1: there is no more work
    int strip;  // index of the strip in its row
    int tiles;  // tiles of h in the row
    int first;  // REDUCE_NEURONS, SAMPLE: the first of them
};

template <Walk WALK>
__device__ __forceinline__ int steps(const Arguments& g, const Work& work) {
    return WALK == SAMPLE ? g.width / BK : work.tiles * (TILE / BK);
}

// The q-th strip of output tiles: `together` rows at a time, columns outermost among them.
template <Walk WALK>
__device__ __forceinline__ Work work_at(const Arguments& g, int q) {
    if (q >= g.rows * g.strips) return {-1, 0, 0, 0};
    int first = q / (g.together * g.strips) * g.together, rest = q % (g.together * g.strips);
    int rows = min(g.together, g.rows - first), row = first + rest % rows, strip = rest / rows;
    if (WALK == REDUCE_TOKENS) {
        int group = g.group_order[row];
        return {group, strip, g.group_count[group], 0};
    }
    return {row, strip, g.start[row + 1] - g.start[row], g.start[row]};
}

// One thread of a cluster takes work and sends it to the producer and the consumers of every CTA. The first unit of
// work comes from the counter as well: if a cluster starts late, because another stream occupies its SMs, the others do
// its work. Every cluster asks once when no work is left; the last one to do so resets the counter to zero.
template <Walk WALK>
__device__ __forceinline__ void schedule(const Arguments& g, u32 slots, u32 ready, u32 taken) {
    int slot = 0, parity = 1;
    for (;;) {
        int q = atomicAdd(g.counter, 1);
        Work work = work_at<WALK>(g, q);
        if (WALK == SAMPLE && work.row >= 0 && 2 * CLUSTER * work.strip >= work.tiles) continue;
        barrier_wait(taken + 8 * slot, parity);
        for (int rank = 0; rank < CLUSTER; ++rank)
            send(slots + 16 * slot, ready + 8 * slot, rank, make_int4(work.row, work.strip, work.tiles, work.first));
        if (work.row < 0) {
            if (q == g.rows * g.strips + (int)gridDim.x / CLUSTER - 1) *g.counter = 0;
            return;
        }
        if (++slot == WORK_SLOTS) slot = 0, parity ^= 1;
    }
}

// The next work, for a producer thread or a whole consumer warp.
struct Inbox {
    u32 slots, ready, taken;
    int slot, parity;

    __device__ __forceinline__ Work next() {
        barrier_wait(ready + 8 * slot, parity);
        uint4 v = load_shared(slots + 16 * slot);
        __syncwarp(__activemask());
        if (threadIdx.x % 32 == 0) barrier_arrive(taken + 8 * slot, 0);
        if (++slot == WORK_SLOTS) slot = 0, parity ^= 1;
        return {(int)v.x, (int)v.y, (int)v.z, (int)v.w};
    }
};

template <Walk WALK, bool A_MN, bool B_MN>
__device__ __forceinline__ void produce(const TensorMap& a, const TensorMap& b, const TensorMap& h, const Arguments& g,
                                        u32 a_smem, u32 b_smem, u32 full, u32 empty, Inbox inbox, int rank) {
    // In REDUCE_TOKENS, groups go over their lists at different rates and share x or dy, so L2 keeps these. In the
    // other products all clusters read B at the same time, and both operands are soon no longer needed.
    constexpr u64 POLICY_A = WALK == REDUCE_TOKENS ? EVICT_FIRST : EVICT_NORMAL;
    constexpr u64 POLICY_B = WALK == REDUCE_TOKENS ? EVICT_LAST : EVICT_NORMAL;
    int stage = 0, parity = 1;
    for (Work work = inbox.next(); work.row >= 0; work = inbox.next()) {
        int count = steps<WALK>(g, work), column = (CLUSTER * work.strip + rank) * BN;
        const int* list = g.group_tiles + (long long)work.row * g.blocks;  // REDUCE_TOKENS
        int tile[2], group[2];                                             // SAMPLE
        if (WALK == SAMPLE)
            for (int i = 0; i < 2; ++i) {
                int slot = 2 * (CLUSTER * work.strip + rank) + i;
                // If there is no such tile, coordinates outside the matrices: the TMA fills in zeros and reads nothing.
                tile[i] = slot < work.tiles ? work.first + slot : 1 << 22;
                group[i] = slot < work.tiles ? g.tile_group[tile[i]] : 1 << 22;
            }
        for (int step = 0; step < count; ++step) {
            int ax = 0, ay, bx, by, k = step % (TILE / BK) * BK;
            if (WALK == REDUCE_NEURONS) {
                int p = work.first + step / (TILE / BK), neuron = g.tile_group[p] * TILE + k;
                ax = k, ay = p * TILE;
                bx = B_MN ? column : neuron, by = B_MN ? neuron : column;
            } else if (WALK == SAMPLE) {
                ax = step * BK, ay = work.row * TILE;
                bx = 0, by = step * BK;
            } else {
                int p = list[step / (TILE / BK)];
                ay = p * TILE + k;
                bx = column, by = g.tile_block[p] * TILE + k;
            }
            u32 into_a = a_smem + stage * A_BYTES, into_b = b_smem + stage * B_BYTES, barrier = full + 8 * stage;
            barrier_wait(empty + 8 * stage, parity);
            barrier_expect(barrier, A_BYTES + B_BYTES);
            // This CTA's share of A, multicast to all CTAs: some of its rows, or rows of one chunk.
            if (A_MN)
                load_all(a, into_a + rank * A_SHARE, barrier, POLICY_A, 0, ay + rank * (TILE / CLUSTER) % BK,
                         rank * 2 / CLUSTER);
            else
                load_all(a, into_a + rank * A_SHARE, barrier, POLICY_A, ax, ay + rank * (TILE / CLUSTER));
            if (WALK == SAMPLE) {
                load(b, into_b, barrier, POLICY_B, 0, by, group[0] * (TILE / BK));
                load(b, into_b + 2 * CHUNK, barrier, POLICY_B, 0, by, group[1] * (TILE / BK));
            } else if (B_MN) {
                load(b, into_b, barrier, POLICY_B, 0, by, bx / BK);
            } else {
                load(b, into_b, barrier, POLICY_B, bx, by);
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        if (WALK == SAMPLE)
            // The two tiles of h that the epilogue needs pass through the same pipeline, one in the place of a B.
            for (int i = 0; i < 2; ++i) {
                barrier_wait(empty + 8 * stage, parity);
                barrier_expect(full + 8 * stage, B_BYTES);
                load(h, b_smem + stage * B_BYTES, full + 8 * stage, EVICT_FIRST, 0, tile[i] * TILE, 0);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
    }
}

// The consumers' place in the pipeline.
struct Pipeline {
    u32 full, empty;
    int stage, parity;

    __device__ __forceinline__ void wait() { barrier_wait(full + 8 * stage, parity); }

    __device__ __forceinline__ int next() {
        int passed = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
        return passed;
    }

    // To all CTAs, because each writes its share of A into this CTA's shared memory.
    __device__ __forceinline__ void release(int passed) {
        if (threadIdx.x % 128 < CLUSTER) barrier_arrive(empty + 8 * passed, threadIdx.x % 128);
    }
};

__device__ __forceinline__ u32 swizzled(u32 base, int row, int unit) {
    return base + row * 128 + ((unit ^ (row & 7)) * 16);
}

// Write the 64 x 256 of one warpgroup: through shared memory, 64 columns at a time, so that 8 threads write 128
// contiguous bytes of a row.
template <Walk WALK, bool TRANSPOSED>
__device__ __forceinline__ void store(const float (&acc)[128], const Arguments& g, const Work& work, Pipeline& pipeline,
                                      u32 b_smem, u32 out_smem, int rank, int group) {
    int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    int column = (CLUSTER * work.strip + rank) * BN, unit = thread % 8, held = 0;
    int line[4];  // the rows that this thread writes, of 64: thread / 8 + 16 i
    for (int i = 0; i < 4; ++i) {
        line[i] = group * 64 + thread / 8 + 16 * i;
        if (WALK == REDUCE_NEURONS) {
            line[i] += work.row * TILE;
            if (line[i] >= g.tokens)
                line[i] = -1;
            else if (g.row_order)
                line[i] = g.row_order[line[i]];
        }
    }
#pragma unroll
    for (int chunk = 0; chunk < BN / 64; ++chunk) {
        u32 buffer = out_smem + (chunk & 1) * CHUNK;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float* v = acc + chunk * 32 + j * 8;
            int matrix = lane / 8, across = matrix / 2, down = matrix % 2;
            int row = TRANSPOSED ? j * 16 + across * 8 + lane % 8 : warp * 16 + down * 8 + lane % 8;
            store_matrices<TRANSPOSED>(swizzled(buffer, row, TRANSPOSED ? warp * 2 + down : j * 2 + across),
                                       pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
        }
        asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
        if (WALK == SAMPLE && chunk % 2 == 0) {
            if (chunk) pipeline.release(held);
            pipeline.wait();
            held = pipeline.next();
        }
        int slot = 2 * (CLUSTER * work.strip + rank) + chunk / 2;  // SAMPLE: which of the block's tiles
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int row = thread / 8 + 16 * i, to = column + chunk * 64 + (TRANSPOSED ? row : unit * 8);
            uint4 v = load_shared(swizzled(buffer, row, unit));
            if (WALK == SAMPLE) {
                if (slot >= work.tiles) continue;
                uint4 h = load_shared(swizzled(b_smem + held * B_BYTES + chunk % 2 * A_BYTES, line[i], unit));
                u32* dh = (u32*)&v;
                const u32* act = (const u32*)&h;
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    dh[e] = pack(2 * root(low_half(act[e])) * low_half(dh[e]),
                                 2 * root(high_half(act[e])) * high_half(dh[e]));
                long long tile = (long long)(work.first + slot) * TILE * TILE;
                *(uint4*)(g.out + tile + line[i] * TILE + chunk % 2 * 64 + unit * 8) = v;
            } else if (WALK == REDUCE_NEURONS) {
                if (line[i] >= 0 && to < g.width) *(uint4*)(g.out + (long long)line[i] * g.leading + to) = v;
            } else if (to < g.width) {
                long long neuron = work.row * TILE + (TRANSPOSED ? group * 64 + unit * 8 : line[i]);
                *(uint4*)(g.out + (TRANSPOSED ? to * (long long)g.leading + neuron : neuron * g.leading + to)) = v;
            }
        }
        // h was read with ordinary loads, and the TMA writes to the same place next.
        if (WALK == SAMPLE && chunk % 2) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    if (WALK == SAMPLE) {
        asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
        pipeline.release(held);
    }
}

template <Walk WALK, bool A_MN, bool B_MN, bool TRANSPOSED>
__device__ __forceinline__ void consume(const Arguments& g, u32 a_smem, u32 b_smem, u32 out_smem, Pipeline pipeline,
                                        Inbox inbox, int rank, int group) {
    // One k16 further: 32 bytes along a row of K, or 16 rows of K.
    constexpr int A_NEXT = (A_MN ? 16 * 128 : 32) >> 4, B_NEXT = (B_MN ? 16 * 128 : 32) >> 4;
    float acc[128];
    for (Work work = inbox.next(); work.row >= 0; work = inbox.next()) {
        int count = steps<WALK>(g, work), last = 0;
        if (count == 0)
#pragma unroll
            for (int i = 0; i < 128; ++i) acc[i] = 0;
        for (int step = 0; step < count; ++step) {
            pipeline.wait();
            u64 a = descriptor(a_smem + pipeline.stage * A_BYTES + group * CHUNK, CHUNK);
            u64 b = descriptor(b_smem + pipeline.stage * B_BYTES, CHUNK);
            wgmma_begin();
#pragma unroll
            for (int k = 0; k < BK / 16; ++k) wgmma<A_MN, B_MN>(acc, a + k * A_NEXT, b + k * B_NEXT, step | k);
            wgmma_commit();
            wgmma_wait<1>();  // the step before this one has read its operands
            if (step > 0) pipeline.release(last);
            last = pipeline.next();
        }
        wgmma_wait<0>();
        if (count) pipeline.release(last);
        store<WALK, TRANSPOSED>(acc, g, work, pipeline, b_smem, out_smem, rank, group);
    }
}

template <Walk WALK, bool A_MN, bool B_MN, bool TRANSPOSED>
__device__ __forceinline__ void product(const TensorMap& a, const TensorMap& b, const TensorMap& h,
                                        const Arguments& g) {
    extern __shared__ char memory[];
    u32 a_smem = (smem_address(memory) + 1023) & ~1023u, b_smem = a_smem + STAGES * A_BYTES;
    u32 out_smem = b_smem + STAGES * B_BYTES, slots = out_smem + OUT_BYTES;
    u32 full = slots + 16 * WORK_SLOTS, empty = full + 8 * STAGES, ready = empty + 8 * STAGES,
        taken = ready + 8 * WORK_SLOTS;
    int rank, group = threadIdx.x / 128;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, 2 * CLUSTER);  // two consumers in each CTA
        }
        for (int slot = 0; slot < WORK_SLOTS; ++slot) {
            barrier_init(ready + 8 * slot, 1);
            barrier_init(taken + 8 * slot, 9 * CLUSTER);  // a producer and eight consumer warps in each CTA
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    Inbox inbox = {slots, ready, taken, 0, 0};
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0)
            produce<WALK, A_MN, B_MN>(a, b, h, g, a_smem, b_smem, full, empty, inbox, rank);
        else if (threadIdx.x == 32 && rank == 0)
            schedule<WALK>(g, slots, ready, taken);
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume<WALK, A_MN, B_MN, TRANSPOSED>(g, a_smem, b_smem, out_smem + (group - 1) * 2 * CHUNK,
                                              {full, empty, 0, 0}, inbox, rank, group - 1);
    }
    // Another CTA may still multicast here or arrive at a barrier of this one.
    cluster_sync();
}

#define PRODUCT(name, ...)                                                               \
    extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(CLUSTER, 1, 1) \
        name(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,   \
             const __grid_constant__ TensorMap h, const __grid_constant__ Arguments g) { \
        product<__VA_ARGS__>(a, b, h, g);                                                \
    }

PRODUCT(reduce_neurons_rows, REDUCE_NEURONS, false, true, false)      // (5): B [f, d], a row a neuron
PRODUCT(reduce_neurons_columns, REDUCE_NEURONS, false, false, false)  // (2): B [d, f], a column a neuron
PRODUCT(sample, SAMPLE, false, true, false)                           // (3)
PRODUCT(reduce_tokens_rows, REDUCE_TOKENS, true, true, false)         // (6): out [f, d]
PRODUCT(reduce_tokens_columns, REDUCE_TOKENS, true, true, true)       // (4): out [d, f]
