// One step of a Llama-like model on a CPU: bfloat16 or packed weights, float32 between them, all rows of a step at once.
//
// Rules:
// - Every row's bits depend on its own token, position and keys alone, never on how many rows run beside it, on the
//   number of threads or on which thread took it. So a prefilled, a decoded, a resumed and a cached token are the same.
// - A product is summed in blocks of 32 along the inner dimension: even and odd elements each in order by fused
//   multiply-add, their sum, then onto what the earlier blocks gave. That is the order of the AMX instruction
//   TDPBF16PS, and the vector code keeps to it, so both give the same bits.
// - Machines without AMX that have VDPBF16PS multiply bfloat16 weights in that instruction's order instead, which doubles
//   their speed: of each pair of inputs the odd product, then the even one, by fused multiply-add onto one sum. Either order
//   can be asked for on any machine (`Config::in_pairs`), so that a run of another machine can be repeated to the bit.
// - Packed weights (8 or 4 bits) have a scale for each 32 inputs. What they are multiplied with is 32 whole numbers of 16
//   bits and a power of two, made of each row alone. Their sum of products is a whole number, so any instruction gives the
//   same; the blocks' sums are added in order by fused multiply-add.
// - Denormals are zero, as in AMX.
// - All threads run the same program, `Engine::run`, phase by phase; work is handed out by a counter (`Team`).
// - Weights: blocks of 32 (inner) x 16 (outer): 16 pairs of rows, each 16 columns x 2. An outer column is an output.
//   Packed ones stand so that 16 bits hold one weight of each of 2 (4) successive pairs, the first in the low bits.
//
// Plain C interface, no library besides threads. Compiled for the machine it runs on.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

constexpr int LANES = 16;    // outer columns of a weight block, and floats of a vector
constexpr int DEPTH = 32;    // inner rows of a weight block
constexpr int BLOCK = LANES * DEPTH;
constexpr int UNIT_BLOCKS = 4;   // column blocks that a thread takes at once
constexpr int ROW_BLOCK = 32;    // rows of one request that attend together
constexpr int HEAD_DIM_MAX = 256;
constexpr int GROUP_ROWS = 4;    // query heads that the vector unit takes together

// ---------------------------------------------------------------- vectors

template <class V, class T> inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V, class T> inline void store(T* to, V v) { std::memcpy(to, &v, sizeof v); }
inline f32x16 splat(float x) { return x - f32x16{}; }
inline f32x16 as_float(u32x16 v) { return reinterpret_cast<f32x16>(v); }

inline float float_of(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
inline uint32_t bits_of(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    return bits;
}

inline f32x16 widen(const uint16_t* bf16) {
    return as_float(__builtin_convertvector(load<u16x16>(bf16), u32x16) << 16);
}

// Round to nearest even; a NaN stays one.
inline void narrow(uint16_t* to, f32x16 v) {
#if defined(__AVX512BF16__)
    store(to, reinterpret_cast<u16x16>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))));
#else
    u32x16 bits = reinterpret_cast<u32x16>(v);
    u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    u32x16 is_nan = reinterpret_cast<u32x16>(v != v);
    rounded = (rounded & ~is_nan) | (is_nan & 0x7fc0u);
    store(to, __builtin_convertvector(rounded, u16x16));
#endif
}

inline float sum(f32x16 v) {
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

// exp of each lane, within 2 units in the last place from -87 to 88; a NaN stays one.
inline f32x16 exponential(f32x16 x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    f32x16 shifted = x * 1.44269504088896341f + splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer
    f32x16 n = shifted - splat(12582912.0f);
    f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    i32x16 exponent = reinterpret_cast<i32x16>(shifted) << 23;  // the low bits of `shifted` hold n
    return p * reinterpret_cast<f32x16>(exponent + (127 << 23));
}

// Inner loops are written in registers of the machine, `PARTS` of which hold what belongs to 16 outputs: GCC keeps wider
// vectors than those on the stack, and is 5 times slower.
#if defined(__AVX512BW__)
constexpr int PART_LANES = 16;
#else
constexpr int PART_LANES = 8;
#endif
constexpr int PARTS = LANES / PART_LANES;
using Sums = int32_t __attribute__((vector_size(PART_LANES * 4)));
using Pairs = int16_t __attribute__((vector_size(PART_LANES * 4)));
using Words = uint32_t __attribute__((vector_size(PART_LANES * 4)));
using Bits = uint16_t __attribute__((vector_size(PART_LANES * 4)));
using Halves = uint16_t __attribute__((vector_size(PART_LANES * 2)));
using Floats = float __attribute__((vector_size(PART_LANES * 4)));

inline Floats splat_part(float x) { return x - Floats{}; }

// a x b + c, rounded once where the machine can: said aloud, because a compiler may see it in one loop and not in the next.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512BW__)
    return reinterpret_cast<Floats>(_mm512_fmadd_ps(
        reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
    return reinterpret_cast<Floats>(_mm256_fmadd_ps(
        reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// ---------------------------------------------------------------- memory

template <class T> class Scratch {
   public:
    ~Scratch() { std::free(data_); }
    bool reserve(size_t count) {
        if (count <= size_) return true;
        void* fresh = std::aligned_alloc(64, round_up(count * sizeof(T), 64));
        if (!fresh) return false;
        std::memset(fresh, 0, round_up(count * sizeof(T), 64));
        std::free(data_);
        data_ = static_cast<T*>(fresh);
        size_ = count;
        return true;
    }
    T* get() const { return data_; }

   private:
    T* data_ = nullptr;
    size_t size_ = 0;
};

// ---------------------------------------------------------------- threads

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Threads that run one program together. Its phases come one after the other; within a phase, whoever is free takes the
// next item. A phase is over when its items are done, not when all threads have come: one that the machine gives no time
// holds up nobody, and finds itself in the phase that the others are at by then.
class Team {
   public:
    // What a thread knows of the run that it takes part in.
    class Member {
       public:
        Member(Team& team, int index) : index(index), team_(team) {}

        // One phase: calls `work(item)` for each item on whichever thread is free; returns when all are done. Every
        // thread of the team calls `each` in the same order, with the same number of items.
        template <class Work> void each(int items, Work work) {
            const uint32_t phase = phase_++;
            for (int spins = 0;;) {
                uint64_t claim = team_.claim_.load(std::memory_order_acquire);
                if (phase_of(claim) != phase) return;
                const int item = int(uint32_t(claim));
                if (item < items) {
                    if (!team_.claim_.compare_exchange_weak(claim, claim + 1, std::memory_order_relaxed)) continue;
                    work(item);
                    if (team_.done_.fetch_add(1, std::memory_order_acq_rel) + 1 == items) return team_.end(phase);
                } else if (items == 0) {
                    if (team_.claim_.compare_exchange_strong(claim, first_of(phase + 1), std::memory_order_acq_rel)) return;
                } else {
                    wait(spins);
                }
            }
        }

        const int index;

       private:
        Team& team_;
        uint32_t phase_ = 0;
    };

    explicit Team(int size) : size_(size) {}
    ~Team() {
        is_over_ = true;
        wake();
        for (auto& thread : threads_) thread.join();
    }

    // Runs `program(arg, member)` on this thread, and on the others as far as they come in time.
    void run(void (*program)(void*, Member&), void* arg) {
        program_ = program;
        arg_ = arg;
        while (static_cast<int>(threads_.size()) < size_ - 1) {
            int index = static_cast<int>(threads_.size()) + 1;
            threads_.emplace_back([this, index, seen = round_.load()] { serve(index, seen); });
        }
        claim_.store(first_of(0), std::memory_order_relaxed);
        inside_.fetch_and(~CLOSED, std::memory_order_release);
        wake();
        Member member(*this, 0);
        program(arg, member);
        // What the program works on is the caller's again once all who came in have left.
        inside_.fetch_or(CLOSED, std::memory_order_acq_rel);
        for (int spins = 0; inside_.load(std::memory_order_acquire) != CLOSED;) wait(spins);
    }

   private:
    static constexpr uint32_t CLOSED = 1u << 31;

    static uint64_t first_of(uint32_t phase) { return uint64_t(phase) << 32; }
    static uint32_t phase_of(uint64_t claim) { return uint32_t(claim >> 32); }

    // Others may need this core, the thread that is waited for among them: spin for some microseconds only.
    static void wait(int& spins) {
        if (spins++ < 4096) relax();
        else sched_yield();
    }

    void end(uint32_t phase) {
        done_.store(0, std::memory_order_relaxed);
        claim_.store(first_of(phase + 1), std::memory_order_release);
    }

    void wake() {
        round_.fetch_add(1);
        round_.notify_all();
    }

    void serve(int index, uint32_t seen) {
        for (;;) {
            round_.wait(seen);
            seen = round_.load();
            if (is_over_) return;
            if (!(inside_.fetch_add(1, std::memory_order_acq_rel) & CLOSED)) {
                Member member(*this, index);
                program_(arg_, member);
            }
            inside_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int size_;
    std::vector<std::thread> threads_;
    void (*program_)(void*, Member&) = nullptr;
    void* arg_ = nullptr;
    std::atomic<bool> is_over_{false};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<uint32_t> inside_{CLOSED};  // other threads that are in the program; `CLOSED`: nobody may enter
    alignas(64) std::atomic<uint64_t> claim_{0};        // the phase, and the next item of it
    alignas(64) std::atomic<int> done_{0};              // items of the phase
};

// Denormals are zero while a thread computes.
class FlushDenormals {
#if defined(__x86_64__)
   public:
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }

   private:
    unsigned before_;
#else
   public:
    FlushDenormals() {}
#endif
};

// ---------------------------------------------------------------- matrix products

struct Weights {
    const void* blocks;
    const uint16_t* scales;  // float16, null for bits = 16; each block's 16 scales, then, for bits = 4, its 16 minima
    const float* bias;       // of each output, or null
    int32_t outputs;
    int32_t inputs;
    int32_t bits;            // 16: bfloat16; 8: scale x (-127 to 127); 4: minimum + scale x (0 to 15)
};

inline int blocks_of(int count, int size) { return (count + size - 1) / size; }

// Where a weight stands in its block, in units of 16 bits, and from which bit on.
struct Place {
    int word;
    int shift;
};
inline Place place_of(int input, int output, int bits) {
    const int pair = input / 2, together = 16 / bits;
    return {(pair / together * LANES + output) * 2 + input % 2, pair % together * bits};
}

// Rows that are multiplied with weights: in bfloat16 and, for packed weights, as whole numbers besides.
class Activations {
   public:
    bool reserve(size_t rows, int width) {
        width_ = width;
        const size_t blocks = rows * (width / DEPTH);
        return floats_.reserve(rows * width) && whole_.reserve(rows * width) && scales_.reserve(2 * blocks);
    }
    uint16_t* floats(size_t row) const { return floats_.get() + row * width_; }
    const int16_t* whole(size_t row) const { return whole_.get() + row * width_; }
    const float* scales(size_t row) const { return scales_.get() + 2 * row * (width_ / DEPTH); }
    int width() const { return width_; }

    // Makes whole numbers of some blocks of a row. Their unit is the power of two that leaves the largest 15 bits: what is
    // at least 1/128 of that, and has the 8 bits of a bfloat16, is taken exactly. A NaN or an infinity makes it NaN.
    void round(size_t row, int first, int count) {
        for (int block = first; block < first + count; block++) {
            const uint16_t* from = floats(row) + block * DEPTH;
            uint32_t largest = 0;
            for (int i = 0; i < DEPTH; i++) largest = std::max<uint32_t>(largest, from[i] & 0x7fffu);
            const uint32_t exponent = std::max(largest >> 7, 15u);  // biased by 127
            const float inverse = float_of((268 - exponent) << 23);
            const float unit = exponent == 255 ? NAN : float_of((exponent - 14) << 23);
            int16_t* to = whole_.get() + row * width_ + block * DEPTH;
            int32_t sum = 0;
            for (int i = 0; i < DEPTH; i++) {
                const float scaled = float_of(uint32_t(from[i]) << 16) * inverse + 12582912.0f;  // 1.5 * 2^23: rounds
                to[i] = int16_t(bits_of(scaled) - bits_of(12582912.0f));
                sum += to[i];
            }
            float* scales = scales_.get() + 2 * (row * (width_ / DEPTH) + block);
            scales[0] = unit;
            scales[1] = float(sum) * unit;
        }
    }

   private:
    int width_ = 0;
    Scratch<uint16_t> floats_;
    Scratch<int16_t> whole_;
    Scratch<float> scales_;  // of each block its unit, and the sum of its numbers
};

// Ask for a weight block that will be needed soon; an address past the end does no harm.
inline void prefetch_block(const uint16_t* block) {
    for (int i = 0; i < BLOCK; i += 32) __builtin_prefetch(block + i);
}

// 16 outputs of `ROWS` rows in the vector unit; see the summation rule above.
template <int ROWS, int COLUMNS>
void vector_tile(const float* a, size_t stride, const uint16_t* w, size_t column_stride, size_t depth_stride,
                 int depth_blocks, f32x16 out[ROWS][COLUMNS]) {
    Floats total[ROWS][COLUMNS][PARTS] = {};
    for (int kb = 0; kb < depth_blocks; kb++)
        for (int part = 0; part < PARTS; part++) {
            Floats even[ROWS][COLUMNS] = {}, odd[ROWS][COLUMNS] = {};
            for (int pair = 0; pair < DEPTH / 2; pair++) {
                const float* x = a + kb * DEPTH + 2 * pair;
                for (int c = 0; c < COLUMNS; c++) {
                    const uint16_t* at = w + c * column_stride + kb * depth_stride + (pair * LANES + part * PART_LANES) * 2;
                    const Words both = load<Words>(at);
                    const Floats low = reinterpret_cast<Floats>(both << 16);
                    const Floats high = reinterpret_cast<Floats>(both & 0xffff0000u);
                    for (int r = 0; r < ROWS; r++) {
                        even[r][c] = fused(low, splat_part(x[r * stride]), even[r][c]);
                        odd[r][c] = fused(high, splat_part(x[r * stride + 1]), odd[r][c]);
                    }
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) total[r][c][part] += even[r][c] + odd[r][c];
        }
    std::memcpy(out, total, sizeof total);
}

#if defined(__AMX_BF16__)
struct alignas(64) TileShape {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0-3 sum, 4-5 hold rows (first and second 16), 6-7 hold weights.
inline void shape_tiles(int first_rows, int second_rows) {
    TileShape shape;
    for (int tile = 0; tile < 8; tile++) {
        shape.row_bytes[tile] = 64;
        bool is_second = tile == 2 || tile == 3 || tile == 5;
        shape.rows[tile] = tile >= 6 ? 16 : uint8_t(is_second ? (second_rows ? second_rows : 1) : first_rows);
    }
    _tile_loadconfig(&shape);
}

// Up to 32 rows x 2 column blocks.
void amx_tile(const uint16_t* a, size_t stride, const uint16_t* w, size_t column_stride, size_t depth_stride,
              int depth_blocks, bool has_second, bool has_pair,
              float* out /* [2][2][16][16]: row half, column block, row, column */) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const uint16_t* second = a + 16 * stride;
    for (int kb = 0; kb < depth_blocks; kb++) {
        _tile_loadd(4, a + kb * DEPTH, stride * 2);
        _tile_loadd(6, w + kb * depth_stride, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (has_pair) {
            _tile_loadd(7, w + column_stride + kb * depth_stride, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (has_second) {
            _tile_loadd(5, second + kb * DEPTH, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            if (has_pair) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, 64);
    if (has_pair) _tile_stored(1, out + 256, 64);
    if (has_second) _tile_stored(2, out + 512, 64);
    if (has_second && has_pair) _tile_stored(3, out + 768, 64);
}
#endif

// 16 outputs of `ROWS` rows in VDPBF16PS's order.
template <int ROWS, int COLUMNS>
void pairs_tile(const uint16_t* a, size_t stride, const uint16_t* w, size_t column_stride, int depth_blocks,
                f32x16 out[ROWS][COLUMNS]) {
    Floats total[ROWS][COLUMNS][PARTS] = {};
    for (int pair = 0; pair < depth_blocks * DEPTH / 2; pair++)
        for (int part = 0; part < PARTS; part++)
            for (int c = 0; c < COLUMNS; c++) {
                const Words both = load<Words>(w + c * column_stride + (pair * LANES + part * PART_LANES) * 2);
                for (int r = 0; r < ROWS; r++) {
                    uint32_t x;
                    std::memcpy(&x, a + r * stride + 2 * pair, sizeof x);
                    Floats& sum = total[r][c][part];
#if defined(__AVX512BF16__)
                    sum = reinterpret_cast<Floats>(_mm512_dpbf16_ps(
                        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(both), reinterpret_cast<__m512bh>(Words{} + x)));
#else
                    const Floats even = reinterpret_cast<Floats>(both << 16), odd = reinterpret_cast<Floats>(both & 0xffff0000u);
                    sum = fused(odd, splat_part(float_of(x & 0xffff0000u)), sum);
                    sum = fused(even, splat_part(float_of(x << 16)), sum);
#endif
                }
            }
    std::memcpy(out, total, sizeof total);
}

// Calls `f` with `count`, which is at most `MOST`, as a constant.
template <int MOST, class F> inline void with_constant(int count, F f) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_constant<MOST - 1>(count, f);
    f(std::integral_constant<int, MOST>{});
}

// As `multiply_unit`, in VDPBF16PS's order.
template <class Emit>
void multiply_pairs(const Activations& a, int rows, const Weights& w, int first_block, int num_blocks, Emit emit) {
    const int depth_blocks = blocks_of(w.inputs, DEPTH);
    const size_t column_stride = size_t(depth_blocks) * BLOCK;
    const uint16_t* base = static_cast<const uint16_t*>(w.blocks) + first_block * column_stride;
    constexpr int ROWS_MOST = 8;
    for (int row = 0; row < rows; row += ROWS_MOST)
        with_constant<ROWS_MOST>(std::min(rows - row, ROWS_MOST), [&]<int ROWS>(std::integral_constant<int, ROWS>) {
            constexpr int COLUMNS_MOST = ROWS > 2 ? 2 : UNIT_BLOCKS;  // what the registers hold
            for (int block = 0; block < num_blocks; block += COLUMNS_MOST)
                with_constant<COLUMNS_MOST>(std::min(num_blocks - block, COLUMNS_MOST), [&]<int COLUMNS>(std::integral_constant<int, COLUMNS>) {
                    f32x16 out[ROWS][COLUMNS];
                    pairs_tile<ROWS, COLUMNS>(a.floats(row), a.width(), base + block * column_stride, column_stride, depth_blocks, out);
                    for (int r = 0; r < ROWS; r++)
                        for (int c = 0; c < COLUMNS; c++) emit(row + r, first_block + block + c, out[r][c]);
                });
        });
}

// Rows x one unit of column blocks. `emit(row, block, sums)` gets 16 outputs of a row.
template <class Emit>
void multiply_unit(const Activations& a, int rows, const Weights& w, int first_block, int num_blocks, Emit emit) {
    const int depth_blocks = blocks_of(w.inputs, DEPTH);
    const size_t stride = a.width();
    const size_t column_stride = size_t(depth_blocks) * BLOCK;
    const uint16_t* base = static_cast<const uint16_t*>(w.blocks) + first_block * column_stride;
#if defined(__AMX_BF16__)
    if (rows > 1) {
        alignas(64) float out[4 * 256];
        int shaped_first = 0, shaped_second = 0;
        for (int block = 0; block < num_blocks; block += 2) {
            const bool has_pair = block + 1 < num_blocks;
            const uint16_t* panel = base + block * column_stride;
            for (int row = 0; row < rows; row += 32) {
                const int first = rows - row < 16 ? rows - row : 16;
                const int left = rows - row - 16;
                const int second = left < 0 ? 0 : left < 16 ? left : 16;
                if (first != shaped_first || second != shaped_second) shape_tiles(first, second);
                shaped_first = first, shaped_second = second;
                amx_tile(a.floats(row), stride, panel, column_stride, BLOCK, depth_blocks, second > 0, has_pair, out);
                for (int c = 0; c < 1 + has_pair; c++) {
                    for (int r = 0; r < first; r++) emit(row + r, first_block + block + c, load<f32x16>(out + c * 256 + r * LANES));
                    for (int r = 0; r < second; r++)
                        emit(row + 16 + r, first_block + block + c, load<f32x16>(out + 512 + c * 256 + r * LANES));
                }
            }
        }
        return;
    }
#endif
    static thread_local Scratch<float> wide;
    constexpr int ROWS = 4;
    if (!wide.reserve(ROWS * stride)) std::abort();
    for (int row = 0; row < rows; row += ROWS) {
        const int here = rows - row < ROWS ? rows - row : ROWS;
        for (size_t i = 0; i < here * stride; i += LANES) store(wide.get() + i, widen(a.floats(row) + i));
        for (int block = 0; block < num_blocks;) {
            const uint16_t* at = base + block * column_stride;
            if (here == ROWS) {
                f32x16 out[ROWS][1];
                vector_tile<ROWS, 1>(wide.get(), stride, at, column_stride, BLOCK, depth_blocks, out);
                for (int r = 0; r < ROWS; r++) emit(row + r, first_block + block, out[r][0]);
                block++;
            } else if (num_blocks - block >= UNIT_BLOCKS) {
                for (int r = 0; r < here; r++) {
                    f32x16 out[1][UNIT_BLOCKS];
                    vector_tile<1, UNIT_BLOCKS>(wide.get() + r * stride, stride, at, column_stride, BLOCK, depth_blocks, out);
                    for (int c = 0; c < UNIT_BLOCKS; c++) emit(row + r, first_block + block + c, out[0][c]);
                }
                block += UNIT_BLOCKS;
            } else {
                for (int r = 0; r < here; r++) {
                    f32x16 out[1][1];
                    vector_tile<1, 1>(wide.get() + r * stride, stride, at, column_stride, BLOCK, depth_blocks, out);
                    emit(row + r, first_block + block, out[0][0]);
                }
                block++;
            }
        }
    }
}

// ---------------------------------------------------------------- products with packed weights

// Two products a lane.
inline Sums add_products(Sums sums, Pairs w, Sums x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return reinterpret_cast<Sums>(_mm512_dpwssd_epi32(
        reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(w), reinterpret_cast<__m512i>(x)));
#elif defined(__AVX512BW__)
    return sums + reinterpret_cast<Sums>(_mm512_madd_epi16(reinterpret_cast<__m512i>(w), reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
    return sums + reinterpret_cast<Sums>(_mm256_madd_epi16(reinterpret_cast<__m256i>(w), reinterpret_cast<__m256i>(x)));
#else
    const Sums wide = reinterpret_cast<Sums>(w);
    return sums + ((wide << 16) >> 16) * ((x << 16) >> 16) + (wide >> 16) * (x >> 16);
#endif
}

inline Floats widen_float16(const uint16_t* from) {
#if defined(__AVX512BW__)
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    const Sums bits = __builtin_convertvector(load<Halves>(from), Sums);
    const Sums rest = (bits & 0x7fff) << 13;
    const Floats smallest = reinterpret_cast<Floats>((Sums{} + 113) << 23);  // 2^-14, below which float16 has no exponent
    const Floats small = reinterpret_cast<Floats>(rest + (113 << 23)) - smallest;
    const Floats large = reinterpret_cast<Floats>(rest + (112 << 23));
    const Sums sign = (bits & 0x8000) << 16;
    return reinterpret_cast<Floats>(reinterpret_cast<Sums>(rest < (1 << 23) ? small : large) | sign);
#endif
}

// The weights of pair `which` in 16 bits each.
template <int BITS> inline Pairs unpack(Bits bits, int which) {
    if constexpr (BITS == 4) return reinterpret_cast<Pairs>(which == 3 ? bits >> 12 : (bits >> (4 * which)) & 15);
    else return reinterpret_cast<Pairs>(bits << (8 - 8 * which)) >> 8;
}

// 16 outputs of `ROWS` rows.
template <int BITS, int ROWS>
void packed_tile(const Activations& a, int row, const uint8_t* w, const uint16_t* scales, int depth_blocks,
                 f32x16 out[ROWS]) {
    constexpr int PAIRS = 16 / BITS;  // that 16 bits hold a weight of
    const int16_t* x = a.whole(row);
    const float* units = a.scales(row);
    const size_t stride = a.width(), units_stride = 2 * (a.width() / DEPTH);
    Floats total[ROWS][PARTS] = {};
    for (int kb = 0; kb < depth_blocks; kb++) {
        for (int part = 0; part < PARTS; part++) {
            Sums sums[ROWS] = {};
            // Not unrolled: GCC would gather all products before it adds them, and has no registers for so many.
#pragma GCC unroll 1
            for (int i = 0; i < BITS; i++) {
                const Bits bits = load<Bits>(w + (i * PARTS + part) * sizeof(Bits));
                for (int pair = 0; pair < PAIRS; pair++) {
                    const Pairs both = unpack<BITS>(bits, pair);
                    for (int r = 0; r < ROWS; r++) {
                        int32_t numbers;
                        std::memcpy(&numbers, x + r * stride + 2 * (i * PAIRS + pair), sizeof numbers);
                        sums[r] = add_products(sums[r], both, Sums{} + numbers);
                    }
                }
            }
            const Floats scale = widen_float16(scales + part * PART_LANES);
            Floats minimum;
            if constexpr (BITS == 4) minimum = widen_float16(scales + LANES + part * PART_LANES);
            for (int r = 0; r < ROWS; r++) {
                const float* unit = units + r * units_stride;
                Floats& sum = total[r][part];
                sum = fused(__builtin_convertvector(sums[r], Floats), scale * unit[0], sum);
                if constexpr (BITS == 4) sum = fused(minimum, splat_part(unit[1]), sum);
            }
        }
        w += BLOCK * BITS / 8;
        x += DEPTH;
        scales += BITS == 4 ? 2 * LANES : LANES;
        units += 2;
    }
    std::memcpy(out, total, sizeof total);
}

// As `multiply_unit`, for packed weights.
template <int BITS, class Emit>
void multiply_packed(const Activations& a, int rows, const Weights& w, int first_block, int num_blocks, Emit emit) {
    const int depth_blocks = blocks_of(w.inputs, DEPTH);
    const size_t column_bytes = size_t(depth_blocks) * BLOCK * BITS / 8;
    const size_t column_scales = size_t(depth_blocks) * LANES * (BITS == 4 ? 2 : 1);
    constexpr int ROWS_MOST = 4;
    for (int row = 0; row < rows; row += ROWS_MOST)
        with_constant<ROWS_MOST>(std::min(rows - row, ROWS_MOST), [&]<int ROWS>(std::integral_constant<int, ROWS>) {
            for (int block = first_block; block < first_block + num_blocks; block++) {
                f32x16 out[ROWS];
                packed_tile<BITS, ROWS>(a, row, static_cast<const uint8_t*>(w.blocks) + block * column_bytes,
                                        w.scales + block * column_scales, depth_blocks, out);
                for (int r = 0; r < ROWS; r++) emit(row + r, block, out[r]);
            }
        });
}

// All outputs of `rows` rows: `emit(row, block, sums)` gets 16 of one row.
template <class Emit>
void multiply(Team::Member& team, const Activations& a, int rows, const Weights& w, bool in_pairs, Emit emit) {
    const int num_blocks = blocks_of(w.outputs, LANES);
    auto finish = [&](int row, int block, f32x16 v) { emit(row, block, w.bias ? v + load<f32x16>(w.bias + block * LANES) : v); };
    team.each(blocks_of(num_blocks, UNIT_BLOCKS), [&](int unit) {
        const int first = unit * UNIT_BLOCKS;
        const int count = num_blocks - first < UNIT_BLOCKS ? num_blocks - first : UNIT_BLOCKS;
        if (w.bits == 4) multiply_packed<4>(a, rows, w, first, count, finish);
        else if (w.bits == 8) multiply_packed<8>(a, rows, w, first, count, finish);
        else if (in_pairs) multiply_pairs(a, rows, w, first, count, finish);
        else multiply_unit(a, rows, w, first, count, finish);
    });
}

// ---------------------------------------------------------------- the model

struct Layer {
    const float* attention_norm;
    const float* mlp_norm;
    const float* query_norm;  // of each head before positions (Qwen 3), or null
    const float* key_norm;
    Weights qkv;
    Weights output;
    Weights gate_up;  // column blocks of gate and up in turn
    Weights down;
};

struct Config {
    int32_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, threads;
    int32_t in_pairs;            // bfloat16 weights are multiplied in VDPBF16PS's order, not in TDPBF16PS's
    float epsilon;
    float scale;                 // of the scores
    const float* cosines;        // [positions, head_dim / 2]
    const float* sines;
    const float* final_norm;
    const uint16_t* embedding;   // [vocab, hidden], or null: that of `head`
    Weights head;
};

// One step. Rows of a request stand together, in order of position.
struct Step {
    int32_t rows;
    const int32_t* token_ids;
    const int32_t* positions;
    uint16_t* const* slots;      // of each row: K and V [layer, 2, kv_head, capacity, head_dim], see `cache`
    const int32_t* capacities;   // positions, a multiple of 32
    int32_t num_logits;
    const int32_t* logit_rows;
    float* logits;               // [num_logits, logits_stride]
    int64_t logits_stride;       // at least the vocabulary, rounded up to 16
};

struct RowBlock {
    int first;
    int rows;
};

class Engine {
   public:
    Engine(const Config& config, const Layer* layers)
        : c_(config), is_packed_(config.head.bits < 16), layers_(layers, layers + config.layers), team_(config.threads),
          private_(config.threads) {}

    bool forward(const Step& step) {
        step_ = step;
        if (!reserve()) return false;
        blocks_.clear();
        int longest = 0;
        for (int row = 0; row < step.rows; row++) {
            if (step.positions[row] > longest) longest = step.positions[row];
            bool joins = row > 0 && step.slots[row] == step.slots[row - 1] && blocks_.back().rows < ROW_BLOCK;
            if (joins) blocks_.back().rows++;
            else blocks_.push_back({row, 1});
        }
        key_stride_ = round_up(longest + 1, DEPTH);
        for (auto& mine : private_)
            if (!mine.scores.reserve(ROW_BLOCK * key_stride_) || !mine.shares.reserve(ROW_BLOCK * key_stride_) ||
                !mine.queries.reserve(size_t(GROUP_ROWS) * c_.head_dim) || !mine.tail.reserve(size_t(DEPTH) * c_.head_dim) ||
                !mine.gate.reserve(size_t(step.rows) * (UNIT_BLOCKS / 2) * LANES))
                return false;
        team_.run([](void* engine, Team::Member& team) { static_cast<Engine*>(engine)->run(team); }, this);
        return true;
    }

   private:
    struct Private {
        Scratch<float> scores, queries, gate;
        Scratch<uint16_t> shares, tail;
    };

    int group() const { return c_.heads / c_.kv_heads; }
    int qkv_width() const { return (c_.heads + 2 * c_.kv_heads) * c_.head_dim; }

    bool reserve() {
        const size_t rows = step_.rows;
        return residual_.reserve(rows * c_.hidden) && normed_.reserve(rows, c_.hidden) &&
               qkv_.reserve(rows * qkv_width()) && queries_.reserve(rows * c_.heads * c_.head_dim) &&
               attended_.reserve(rows, c_.heads * c_.head_dim) && gated_.reserve(rows, c_.intermediate);
    }

    // The whole step, run by every thread.
    void run(Team::Member& team) {
        FlushDenormals flush;
        Private& mine = private_[team.index];
        const Step& step = step_;
        const int rows = step.rows;
        team.each(rows, [&](int row) { embed(row); });
        for (int index = 0; index < c_.layers; index++) {
            const Layer& layer = layers_[index];
            team.each(rows, [&](int row) { normalise(row, layer.attention_norm, row); });
            multiply(team, normed_, rows, layer.qkv, c_.in_pairs, [&](int row, int block, f32x16 v) {
                store(qkv_.get() + size_t(row) * qkv_width() + block * LANES, v);
            });
            const int items = int(blocks_.size()) * c_.kv_heads;
            team.each(items, [&](int item) { place(blocks_[item / c_.kv_heads], item % c_.kv_heads, index); });
            team.each(items, [&](int item) {
                // The longest blocks are the last ones: take them first, so that no thread ends alone with one.
                attend(blocks_[blocks_.size() - 1 - item / c_.kv_heads], item % c_.kv_heads, index, mine);
            });
            multiply(team, attended_, rows, layer.output, c_.in_pairs, [&](int row, int block, f32x16 v) { add(row, block, v); });
            team.each(rows, [&](int row) { normalise(row, layer.mlp_norm, row); });
            multiply(team, normed_, rows, layer.gate_up, c_.in_pairs, [&](int row, int block, f32x16 v) {
                float* gate = mine.gate.get() + (size_t(row) * (UNIT_BLOCKS / 2) + block / 2 % (UNIT_BLOCKS / 2)) * LANES;
                if (block % 2 == 0) return store(gate, v);
                const f32x16 g = load<f32x16>(gate);
                narrow(gated_.floats(row) + block / 2 * LANES, g / (exponential(-g) + splat(1.0f)) * v);
                if (is_packed_ && block % 4 == 3) gated_.round(row, block / 4, 1);
            });
            multiply(team, gated_, rows, layer.down, c_.in_pairs, [&](int row, int block, f32x16 v) { add(row, block, v); });
        }
        team.each(step.num_logits, [&](int i) { normalise(step.logit_rows[i], c_.final_norm, i); });
        if (step.num_logits)
            multiply(team, normed_, step.num_logits, c_.head, c_.in_pairs, [&](int row, int block, f32x16 v) {
                store(step.logits + row * step.logits_stride + block * LANES, v);
            });
    }

    void embed(int row) {
        float* to = residual_.get() + size_t(row) * c_.hidden;
        const int token = step_.token_ids[row];
        if (c_.embedding) {
            const uint16_t* from = c_.embedding + size_t(token) * c_.hidden;
            for (int i = 0; i < c_.hidden; i += LANES) store(to + i, widen(from + i));
            return;
        }
        const Weights& head = c_.head;
        const int lane = token % LANES;
        for (int kb = 0; kb < c_.hidden / DEPTH; kb++) {
            const size_t block = size_t(token / LANES) * (c_.hidden / DEPTH) + kb;
            const uint16_t* words = static_cast<const uint16_t*>(head.blocks) + block * BLOCK * head.bits / 16;
            float scale = 1.0f;
            if (head.bits == 8) {
                const uint16_t* scales = head.scales + block * LANES + lane / PART_LANES * PART_LANES;
                scale = widen_float16(scales)[lane % PART_LANES];
            }
            for (int i = 0; i < DEPTH; i++) {
                const Place at = place_of(i, lane, head.bits);
                const uint16_t word = words[at.word];
                to[kb * DEPTH + i] = head.bits == 8 ? int8_t(word >> at.shift) * scale : float_of(uint32_t(word) << 16);
            }
        }
    }

    // Root mean square norm of a row of the residual, to row `to` of `normed_`.
    void normalise(int row, const float* weight, int to) {
        const float* x = residual_.get() + size_t(row) * c_.hidden;
        f32x16 squares = {};
        for (int i = 0; i < c_.hidden; i += LANES) {
            f32x16 v = load<f32x16>(x + i);
            squares += v * v;
        }
        const float factor = 1.0f / std::sqrt(sum(squares) / c_.hidden + c_.epsilon);
        for (int i = 0; i < c_.hidden; i += LANES)
            narrow(normed_.floats(to) + i, load<f32x16>(x + i) * factor * load<f32x16>(weight + i));
        if (is_packed_) normed_.round(to, 0, c_.hidden / DEPTH);
    }

    void add(int row, int block, f32x16 v) {
        float* x = residual_.get() + size_t(row) * c_.hidden + block * LANES;
        store(x, load<f32x16>(x) + v);
    }

    // Keys (0) or values (1) of a head. Both are weights to a product, so they stand in weight blocks: keys as 16 outputs
    // each, over the head's dimensions; values as 32 inputs each, with the dimensions as outputs. Either way 32 positions
    // fill 32 x head_dim numbers.
    uint16_t* cache(int row, int layer, int which, int kv_head) const {
        const size_t head = (size_t(layer) * 2 + which) * c_.kv_heads + kv_head;
        return step_.slots[row] + head * step_.capacities[row] * c_.head_dim;
    }

    // Norms and positions of the queries and keys of a KV head; its keys and values go to the cache.
    void place(const RowBlock& block, int kv_head, int layer) {
        const int dim = c_.head_dim, group = this->group();
        uint16_t* k = cache(block.first, layer, 0, kv_head);
        uint16_t* v = cache(block.first, layer, 1, kv_head);
        alignas(64) uint16_t narrowed[HEAD_DIM_MAX];
        for (int row = block.first; row < block.first + block.rows; row++) {
            const int position = step_.positions[row];
            float* own = qkv_.get() + size_t(row) * qkv_width();
            for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
                rotate(own + head * dim, layers_[layer].query_norm, position);
                uint16_t* to = queries_.get() + (size_t(row) * c_.heads + head) * dim;
                for (int i = 0; i < dim; i += LANES) narrow(to + i, load<f32x16>(own + head * dim + i));
            }
            float* key = own + (c_.heads + kv_head) * dim;
            rotate(key, layers_[layer].key_norm, position);
            for (int i = 0; i < dim; i += LANES) narrow(narrowed + i, load<f32x16>(key + i));
            uint16_t* to = k + size_t(position / LANES) * LANES * dim + position % LANES * 2;
            for (int i = 0; i < dim; i += 2) std::memcpy(to + i * LANES, narrowed + i, 4);
            const float* value = own + (c_.heads + c_.kv_heads + kv_head) * dim;
            for (int i = 0; i < dim; i += LANES) narrow(narrowed + i, load<f32x16>(value + i));
            to = v + size_t(position / DEPTH) * DEPTH * dim + position % DEPTH / 2 * 2 * LANES + position % 2;
            for (int i = 0; i < dim; i++) to[i / LANES * BLOCK + i % LANES * 2] = narrowed[i];
        }
    }

    void rotate(float* x, const float* norm, int position) {
        const int dim = c_.head_dim, half = dim / 2;
        if (norm) {
            f32x16 squares = {};
            for (int i = 0; i < dim; i += LANES) squares += load<f32x16>(x + i) * load<f32x16>(x + i);
            const float factor = 1.0f / std::sqrt(sum(squares) / dim + c_.epsilon);
            for (int i = 0; i < dim; i += LANES) store(x + i, load<f32x16>(x + i) * factor * load<f32x16>(norm + i));
        }
        const float* cosines = c_.cosines + size_t(position) * half;
        const float* sines = c_.sines + size_t(position) * half;
        for (int i = 0; i < half; i += LANES) {
            const f32x16 a = load<f32x16>(x + i), b = load<f32x16>(x + half + i);
            const f32x16 cosine = load<f32x16>(cosines + i), sine = load<f32x16>(sines + i);
            store(x + i, a * cosine - b * sine);
            store(x + half + i, b * cosine + a * sine);
        }
    }

    // Each query runs over its keys in blocks from position 0, whatever its neighbours do. Keys that it must not see get a
    // share of exactly zero, so a sum over more blocks than it needs has the same bits.
    void attend(const RowBlock& block, int kv_head, int layer, Private& mine) {
        const int keys = step_.positions[block.first] + block.rows;
        const uint16_t* k = cache(block.first, layer, 0, kv_head);
        const uint16_t* v = cache(block.first, layer, 1, kv_head);
        if (keys % DEPTH) copy_tail(v, keys, mine);
#if defined(__AMX_BF16__)
        if (block.rows > 1) {
            for (int head = kv_head * group(); head < (kv_head + 1) * group(); head++) attend_rows(block, head, k, v, mine);
            return;
        }
#endif
        for (int row = block.first; row < block.first + block.rows; row++)
            for (int head = kv_head * group(); head < (kv_head + 1) * group();) {
                const int left = (kv_head + 1) * group() - head;
                if (left >= 4) attend_row<4>(row, head, keys, k, v, mine), head += 4;
                else if (left == 3) attend_row<3>(row, head, keys, k, v, mine), head += 3;
                else if (left == 2) attend_row<2>(row, head, keys, k, v, mine), head += 2;
                else attend_row<1>(row, head, keys, k, v, mine), head += 1;
            }
    }

    // The last values, with zeros for positions that nobody has written yet: no share times such a number is zero.
    void copy_tail(const uint16_t* v, int keys, Private& mine) {
        const int dim = c_.head_dim, here = keys % DEPTH;
        const uint16_t* from = v + size_t(keys - here) * dim;
        for (int i = 0; i < DEPTH * dim; i += 2 * LANES) {
            const int pair = i % BLOCK / (2 * LANES);
            const uint32_t kept = 2 * pair + 1 < here ? 0xffffffffu : 2 * pair < here ? 0x0000ffffu : 0u;
            store(mine.tail.get() + i, load<u32x16>(from + i) & kept);
        }
    }

    // `HEADS` query heads of one row in the vector unit. `keys`: of its request, which may go on after the row.
    template <int HEADS>
    void attend_row(int row, int head, int keys, const uint16_t* k, const uint16_t* v, Private& mine) {
        const int dim = c_.head_dim, visible = step_.positions[row] + 1;
        const uint16_t* queries = queries_.get() + (size_t(row) * c_.heads + head) * dim;
        for (int i = 0; i < HEADS * dim; i += LANES) store(mine.queries.get() + i, widen(queries + i));
        for (int key = 0; key < visible; key += LANES) {
            f32x16 out[HEADS][1];
            for (int i = 0; i < dim / DEPTH; i++) prefetch_block(k + size_t(key + 2 * LANES) * dim + i * BLOCK);
            vector_tile<HEADS, 1>(mine.queries.get(), dim, k + size_t(key) * dim, 0, BLOCK, dim / DEPTH, out);
            for (int h = 0; h < HEADS; h++) store(mine.scores.get() + h * key_stride_ + key, out[h][0]);
        }
        float factors[HEADS];
        for (int h = 0; h < HEADS; h++) {
            float* scores = mine.scores.get() + h * key_stride_;
            factors[h] = soften(scores, visible, [&](int key, const uint16_t* shares) { store(scores + key, widen(shares)); });
        }
        f32x16 out[HEADS][HEAD_DIM_MAX / LANES] = {};
        const size_t block_size = size_t(DEPTH) * dim;
        for (int block = 0; block * DEPTH < visible; block++) {
            const bool is_tail = (block + 1) * DEPTH > keys;
            const uint16_t* at = is_tail ? mine.tail.get() : v + block * block_size;
            for (int i = 0; i < dim / LANES; i++) {
                prefetch_block(v + (block + 1) * block_size + i * BLOCK);
                f32x16 more[HEADS][1];
                vector_tile<HEADS, 1>(mine.scores.get() + block * DEPTH, key_stride_, at + i * BLOCK, 0, 0, 1, more);
                for (int h = 0; h < HEADS; h++) out[h][i] += more[h][0];
            }
        }
        uint16_t* to = attended_.floats(row) + head * dim;
        for (int h = 0; h < HEADS; h++)
            for (int i = 0; i < dim / LANES; i++) narrow(to + h * dim + i * LANES, out[h][i] * factors[h]);
        if (is_packed_) attended_.round(row, head * dim / DEPTH, HEADS * dim / DEPTH);
    }

#if defined(__AMX_BF16__)
    // One query head of up to 32 rows in the matrix unit.
    void attend_rows(const RowBlock& block, int head, const uint16_t* k, const uint16_t* v, Private& mine) {
        const int dim = c_.head_dim, start = step_.positions[block.first], keys = start + block.rows;
        const int first = block.rows < 16 ? block.rows : 16, second = block.rows - first;
        const size_t stride = size_t(c_.heads) * dim;
        const uint16_t* queries = queries_.get() + block.first * stride + head * dim;
        alignas(64) float out[4 * 256], rest[4 * 256];
        auto each_row = [&](auto visit) {
            for (int r = 0; r < block.rows; r++) visit(r, r / 16 * 512 + r % 16 * LANES);
        };
        shape_tiles(first, second);
        for (int key = 0; key < keys; key += 2 * LANES) {
            const bool has_pair = key + LANES < keys;
            amx_tile(queries, stride, k + size_t(key) * dim, size_t(LANES) * dim, BLOCK, dim / DEPTH, second > 0, has_pair, out);
            each_row([&](int r, int at) {
                float* to = mine.scores.get() + r * key_stride_ + key;
                store(to, load<f32x16>(out + at));
                if (has_pair) store(to + LANES, load<f32x16>(out + at + 256));
            });
        }
        float factors[ROW_BLOCK];
        const int padded = int(round_up(keys, DEPTH));
        for (int r = 0; r < block.rows; r++) {
            uint16_t* shares = mine.shares.get() + r * key_stride_;
            const int visible = start + r + 1;
            factors[r] = soften(mine.scores.get() + r * key_stride_, visible, [&](int key, const uint16_t* some) {
                std::memcpy(shares + key, some, LANES * 2);
            });
            const int written = int(round_up(visible, DEPTH));
            std::memset(shares + written, 0, size_t(padded - written) * 2);
        }
        const int blocks = keys / DEPTH;
        for (int i = 0; i < dim; i += 2 * LANES) {
            const uint16_t* from = v + i / LANES * BLOCK;
            amx_tile(mine.shares.get(), key_stride_, from, BLOCK, size_t(DEPTH) * dim, blocks, second > 0, true, out);
            if (keys % DEPTH)
                amx_tile(mine.shares.get() + blocks * DEPTH, key_stride_, mine.tail.get() + i / LANES * BLOCK, BLOCK, 0, 1,
                         second > 0, true, rest);
            each_row([&](int r, int at) {
                uint16_t* to = attended_.floats(block.first + r) + head * dim + i;
                for (int half = 0; half < 2; half++) {
                    f32x16 total = load<f32x16>(out + at + half * 256);
                    if (keys % DEPTH) total += load<f32x16>(rest + at + half * 256);
                    narrow(to + half * LANES, total * factors[r]);
                }
            });
        }
        if (is_packed_)
            for (int r = 0; r < block.rows; r++) attended_.round(block.first + r, head * dim / DEPTH, dim / DEPTH);
    }
#endif

    // Softmax over the first `visible` scores, less the division: `emit(key, shares)` gets 16 shares in bfloat16 at a time,
    // up to a multiple of 32; the result is one over their sum.
    template <class Emit> float soften(const float* scores, int visible, Emit emit) const {
        constexpr i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        f32x16 best = splat(-INFINITY);
        for (int key = 0; key < visible; key += LANES) {
            const f32x16 s = load<f32x16>(scores + key);
            best = (lanes < visible - key) & (s > best) ? s : best;
        }
        float top = -INFINITY;
        for (int i = 0; i < LANES; i++) top = best[i] > top ? best[i] : top;
        f32x16 total = {};
        for (int key = 0; key < int(round_up(visible, DEPTH)); key += LANES) {
            alignas(64) uint16_t shares[LANES] = {};
            if (key < visible) {
                const f32x16 e = exponential((load<f32x16>(scores + key) - splat(top)) * c_.scale);
                narrow(shares, lanes < visible - key ? e : f32x16{});
                total += widen(shares);
            }
            emit(key, shares);
        }
        return 1.0f / sum(total);
    }

    const Config c_;
    const bool is_packed_;  // whether products take whole numbers
    const std::vector<Layer> layers_;
    Team team_;
    std::vector<Private> private_;
    Step step_{};
    std::vector<RowBlock> blocks_;
    size_t key_stride_ = 0;
    Scratch<float> residual_, qkv_;
    Scratch<uint16_t> queries_;
    Activations normed_, attended_, gated_;
};

// Round to nearest even; a NaN stays one.
uint16_t narrow_float16(float f) {
    const uint32_t sign = bits_of(f) >> 16 & 0x8000u, bits = bits_of(f) & 0x7fffffffu;
    if (bits > 0x7f800000u) return 0x7e00u;
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (bits < 0x38800000u)  // below 2^-14 the unit is 2^-24, which is also that of a float32 from 0.5 to 1
        return uint16_t(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)));
    return uint16_t(sign | (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13);
}

constexpr float SCALE_MIN = 0x1p-20f;  // below this float16 is too coarse for a scale

inline float at_least(float x, float least) { return x < least ? least : x; }  // a NaN stays one

// 32 weights as whole numbers of `BITS` bits, and the scale, in 4 bits also the minimum, that fit those best.
template <int BITS> void quantise_block(const uint16_t* from, uint8_t* whole, uint16_t* scales) {
    float x[DEPTH], numbers[DEPTH];
    float least = INFINITY, most = -INFINITY, sum = 0;
    for (int i = 0; i < DEPTH; i++) {
        x[i] = float_of(uint32_t(from[i]) << 16);
        least = std::min(least, x[i]);
        most = std::max(most, x[i]);
        sum += x[i];
    }
    const float zero = BITS == 4 ? least : 0.0f;
    const float range = BITS == 4 ? (most - least) / 15 : std::max(most, -least) / 127;
    const float step = at_least(range, SCALE_MIN);
    float number_sum = 0;
    for (int i = 0; i < DEPTH; i++) {
        numbers[i] = std::nearbyint((x[i] - zero) / step);
        number_sum += numbers[i];
        whole[i] = uint8_t(int32_t(numbers[i]));
    }
    const float middle = BITS == 4 ? number_sum / DEPTH : 0.0f;
    float along = 0, square = 0;
    for (int i = 0; i < DEPTH; i++) {
        along += (numbers[i] - middle) * x[i];
        square += (numbers[i] - middle) * (numbers[i] - middle);
    }
    scales[0] = narrow_float16(at_least(along / at_least(square, BITS == 4 ? 0.5f : 1.0f), SCALE_MIN));
    if constexpr (BITS == 4) {
        float stored[PART_LANES];
        const Halves scale = Halves{} + scales[0];
        store(stored, widen_float16(reinterpret_cast<const uint16_t*>(&scale)));
        scales[1] = narrow_float16(sum / DEPTH - stored[0] * middle);
    }
}

template <class T>
void pack_blocks(const T* from, int outputs, int inputs, int bits, int first_block, int step, uint16_t* to) {
    const int depth_blocks = blocks_of(inputs, DEPTH);
    const size_t words = size_t(BLOCK) * bits / 16;
    for (int block = 0; block < blocks_of(outputs, LANES); block++) {
        uint16_t* column = to + size_t(first_block + block * step) * depth_blocks * words;
        std::memset(column, 0, depth_blocks * words * sizeof *to);
        const int lanes = std::min(outputs - block * LANES, LANES);
        for (int lane = 0; lane < lanes; lane++) {
            const T* row = from + size_t(block * LANES + lane) * inputs;
            for (int input = 0; input < inputs; input++) {
                const Place at = place_of(input % DEPTH, lane, bits);
                const uint16_t weight = uint16_t(row[input]) & uint16_t((1 << bits) - 1);
                column[input / DEPTH * words + at.word] |= uint16_t(weight << at.shift);
            }
        }
    }
}

}  // namespace

extern "C" {

// Whether this machine lets the process use what the file was compiled for.
int32_t gptoss_can_run() {
#if defined(__AMX_BF16__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 1;
#endif
}

// Which order of summing is faster here: 1 is that of pairs.
int32_t gptoss_prefers_pairs() {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    return 1;
#else
    return 0;
#endif
}

// Blocks of 32 bfloat16 weights as whole numbers of 8 or 4 bits, each in 1 byte, and each block's scale and, in 4 bits, minimum
// in float16.
void gptoss_quantise(const uint16_t* from, int64_t blocks, int32_t bits, uint8_t* whole, uint16_t* scales) {
    for (int64_t block = 0; block < blocks; block++, from += DEPTH, whole += DEPTH)
        if (bits == 4) quantise_block<4>(from, whole, scales + 2 * block);
        else quantise_block<8>(from, whole, scales + block);
}

// Lays out `outputs` x `inputs` weights as blocks: every `step`th from `first_block`. A weight comes in 2 bytes if it has 16
// bits, else in 1.
void gptoss_pack(const void* from, int32_t outputs, int32_t inputs, int32_t bits, int32_t first_block, int32_t step, void* to) {
    uint16_t* blocks = static_cast<uint16_t*>(to);
    if (bits == 16) pack_blocks(static_cast<const uint16_t*>(from), outputs, inputs, bits, first_block, step, blocks);
    else pack_blocks(static_cast<const uint8_t*>(from), outputs, inputs, bits, first_block, step, blocks);
}

// Null if the model's shape is not one that this file can run, or memory is short. What `config` points to must stay.
void* gptoss_create(const Config* config, const Layer* layers) {
    const Config& c = *config;
    const bool has_dim = c.head_dim % DEPTH == 0 && c.head_dim <= HEAD_DIM_MAX;
    const bool fits = c.hidden % DEPTH == 0 && c.intermediate % DEPTH == 0 && c.heads % c.kv_heads == 0 && c.threads > 0;
    return has_dim && fits ? new (std::nothrow) Engine(c, layers) : nullptr;
}

void gptoss_destroy(void* engine) { delete static_cast<Engine*>(engine); }

// 0, or 1 if memory is short. Not for two threads at once.
int32_t gptoss_forward(void* engine, const Step* step) { return static_cast<Engine*>(engine)->forward(*step) ? 0 : 1; }
}
