// The product grad_output^T @ inputs at selected entries only, and the sums of grad_output over the tokens; see cpu.py.
//
// Every thread takes a run of tokens. Tiles of both operands are laid out along the tokens, so that an entry is a dot
// product of two contiguous runs; four entries of a neuron share one pass over the neuron's run.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t TILE = 256;           // tokens laid out at once
constexpr int64_t ROW = TILE + 16;      // padded: a power of two would map all runs to the same cache sets
constexpr int64_t SQUARE = 8;
constexpr int64_t NEURONS_AT_ONCE = 256;

inline float load(const float* from) { return *from; }

inline float load(const uint16_t* from) {  // bfloat16: the upper half of a float32
    const uint32_t bits = static_cast<uint32_t>(*from) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

template <typename T>
struct Matrix {
    const T* data;
    int64_t stride;         // from one token to the next
    const int64_t* gather;  // which columns to read, all in order if null
    int64_t columns;        // number of columns to read
};

// In small squares, so that neither reading nor writing leaves the cache.
template <typename T>
void along_tokens(const Matrix<T>& from, int64_t token, int64_t tokens, int64_t column, int64_t columns, float* to) {
    for (int64_t start = 0; start < tokens; start += SQUARE)
        for (int64_t block = 0; block < columns; block += SQUARE) {
            const int64_t end = std::min(start + SQUARE, tokens), last = std::min(block + SQUARE, columns);
            for (int64_t c = block; c < last; ++c) {
                const T* read = from.data + token * from.stride + (from.gather ? from.gather[column + c] : column + c);
                for (int64_t t = start; t < end; ++t) to[c * ROW + t] = load(read + t * from.stride);
            }
        }
}

template <typename T>
void accumulate(const Matrix<T>& grad, const Matrix<T>& input, const int32_t* row_starts, const int32_t* columns,
                int64_t first, int64_t last, float* sums, float* grad_sums) {
    std::vector<float> inputs(input.columns * ROW), grads(NEURONS_AT_ONCE * ROW);
    for (int64_t start = first; start < last; start += TILE) {
        const int64_t tokens = std::min(TILE, last - start);
        along_tokens(input, start, tokens, 0, input.columns, inputs.data());
        for (int64_t block = 0; block < grad.columns; block += NEURONS_AT_ONCE) {
            const int64_t size = std::min(NEURONS_AT_ONCE, grad.columns - block);
            along_tokens(grad, start, tokens, block, size, grads.data());
            for (int64_t neuron = 0; neuron < size; ++neuron) {
                const float* g = grads.data() + neuron * ROW;
                float grad_sum = 0;
#pragma omp simd reduction(+ : grad_sum)
                for (int64_t token = 0; token < tokens; ++token) grad_sum += g[token];
                grad_sums[block + neuron] += grad_sum;
                int64_t entry = row_starts[block + neuron];
                const int64_t end = row_starts[block + neuron + 1];
                for (; entry + 4 <= end; entry += 4) {
                    const float* a = inputs.data() + columns[entry] * ROW;
                    const float* b = inputs.data() + columns[entry + 1] * ROW;
                    const float* c = inputs.data() + columns[entry + 2] * ROW;
                    const float* d = inputs.data() + columns[entry + 3] * ROW;
                    float sum_a = 0, sum_b = 0, sum_c = 0, sum_d = 0;
#pragma omp simd reduction(+ : sum_a, sum_b, sum_c, sum_d)
                    for (int64_t token = 0; token < tokens; ++token) {
                        sum_a += g[token] * a[token];
                        sum_b += g[token] * b[token];
                        sum_c += g[token] * c[token];
                        sum_d += g[token] * d[token];
                    }
                    sums[entry] += sum_a;
                    sums[entry + 1] += sum_b;
                    sums[entry + 2] += sum_c;
                    sums[entry + 3] += sum_d;
                }
                for (; entry < end; ++entry) {
                    const float* a = inputs.data() + columns[entry] * ROW;
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int64_t token = 0; token < tokens; ++token) sum += g[token] * a[token];
                    sums[entry] += sum;
                }
            }
        }
    }
}

// The same sum every time, in the order of the threads.
void add_up(const std::vector<float>& parts, int64_t threads, int64_t size, float* result) {
    for (int64_t i = 0; i < size; ++i) {
        float sum = 0;
        for (int64_t thread = 0; thread < threads; ++thread) sum += parts[thread * size + i];
        result[i] = sum;
    }
}

template <typename T>
void product(const Matrix<T>& grad, const Matrix<T>& input, const int32_t* row_starts, const int32_t* columns,
             float* result, float* grad_sums, int64_t tokens, int64_t threads) {
    const int64_t neurons = grad.columns, entries = row_starts[neurons], share = (tokens + threads - 1) / threads;
    std::vector<float> sums(threads * entries), grads(threads * neurons);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t thread = 0; thread < threads; ++thread)
        accumulate(grad, input, row_starts, columns, std::min(tokens, thread * share),
                   std::min(tokens, (thread + 1) * share), sums.data() + thread * entries,
                   grads.data() + thread * neurons);
    add_up(sums, threads, entries, result);
    add_up(grads, threads, neurons, grad_sums);
}

}  // namespace

#define EXPORT(NAME, TYPE)                                                                                        \
    void NAME(const TYPE* grad, int64_t grad_stride, int64_t neurons, const TYPE* input, int64_t input_stride,    \
              int64_t used, const int64_t* gather, const int32_t* row_starts, const int32_t* columns,             \
              float* result, float* grad_sums, int64_t tokens, int64_t threads) {                                 \
        product<TYPE>({grad, grad_stride, nullptr, neurons}, {input, input_stride, gather, used}, row_starts,     \
                      columns, result, grad_sums, tokens, threads);                                               \
    }

extern "C" {
EXPORT(sampled_product_float32, float)
EXPORT(sampled_product_bfloat16, uint16_t)
}
