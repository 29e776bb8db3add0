/* Products of a matrix in compressed rows with matrices whose rows lie one after another.

   multiply:  out (rows, batch)   =  matrix (rows, inner) @ dense (inner, batch) + bias (rows)
   sample:    out (entries)       =  for every live entry (i, j) the dot product of
                                     row i of left (rows, batch) and row j of dense (inner, batch)

   The batch is cut into panels of up to 8 vectors, so that what belongs to a row of the matrix
   stays in registers while its entries are gone through. The rows of the dense matrix are taken
   in blocks that stay in the second level cache, copied so that a panel lies in one piece if it
   is read often enough. Columns ascend, so within a row the entries of a block follow those of
   the block before.

   A job is cut into parts, which threads take one by one. Every number is added up by one part,
   in an order that depends on neither the number of parts nor the threads nor the blocks.

   The file includes itself once for each type of numbers. */

#ifndef REAL

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__AVX512F__)
#define WIDTH 64 /* bytes of a vector */
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define WIDEST 8 /* vectors of the widest panel */

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHUFFLE(kind, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(kind, a, b, ...) __builtin_shuffle(a, b, (kind){__VA_ARGS__})
#endif

struct job {
    int64_t is_double, is_sample;
    int64_t rows, inner, batch;
    const int32_t *starts;  /* (rows + 1) */
    const int32_t *columns; /* (entries), ascending in each row */
    const void *values;     /* (entries); not read for a sample */
    const void *dense;      /* (inner, batch) */
    const void *left;       /* bias (rows) or NULL; for a sample (rows, batch) */
    void *out;              /* (rows, batch); for a sample (slabs, entries), to be added up */
    int64_t groups, slabs;  /* a part is a group of rows with a slab of panels; see native.py */
    int64_t next;           /* the part to be taken next */
    int64_t failed;         /* whether memory ran out */
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Ask for memory that will soon be wanted. */
INLINE void fetch(const void *from, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i);
}

/* Bytes of the dense matrix that are worked on at a time: half of the second level cache. */
static int64_t bytes_of_block(void)
{
    static int64_t known; /* asking can take long */
    int64_t bytes = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (bytes) return bytes;
    bytes = 512 * 1024;
#ifdef _SC_LEVEL2_CACHE_SIZE
    {
        const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
        if (cache >= 128 * 1024) bytes = cache / 128 * 64;
    }
#endif
    __atomic_store_n(&known, bytes, __ATOMIC_RELAXED);
    return bytes;
}

/* First row of a group, such that groups have about equally much to do. */
static int64_t first_row(const struct job *job, int64_t group)
{
    const int64_t total = job->starts[job->rows] + 4 * job->rows;
    const int64_t wanted = (int64_t)((double)total * (double)group / (double)job->groups);
    int64_t low = 0, high = job->rows;
    if (group == job->groups) return job->rows;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (job->starts[middle] + 4 * middle < wanted) low = middle + 1;
        else high = middle;
    }
    return low;
}

typedef float quad_float __attribute__((vector_size(16)));
typedef double quad_double __attribute__((vector_size(16)));
typedef int32_t four __attribute__((vector_size(16)));
typedef int64_t two __attribute__((vector_size(16)));

/* The sums of the numbers of each of four vectors. */
INLINE quad_float across_float(const quad_float *x)
{
    const quad_float a =
        SHUFFLE(four, x[0], x[1], 0, 4, 1, 5) + SHUFFLE(four, x[0], x[1], 2, 6, 3, 7);
    const quad_float b =
        SHUFFLE(four, x[2], x[3], 0, 4, 1, 5) + SHUFFLE(four, x[2], x[3], 2, 6, 3, 7);
    return SHUFFLE(four, a, b, 0, 1, 4, 5) + SHUFFLE(four, a, b, 2, 3, 6, 7);
}

/* The sums of the numbers of each of two vectors. */
INLINE quad_double across_double(const quad_double *x)
{
    return SHUFFLE(two, x[0], x[1], 0, 2) + SHUFFLE(two, x[0], x[1], 1, 3);
}

#define REAL float
#define NAME(name) name##_float
#include "csr.c"
#undef REAL
#undef NAME
#define REAL double
#define NAME(name) name##_double
#include "csr.c"

/* Numbers of the batch in the widest panel. */
int64_t panel(int64_t is_double)
{
    return WIDEST * WIDTH / (int64_t)(is_double ? sizeof(double) : sizeof(float));
}

/* Take parts until there are none left; for each thread to call. */
void work(void *given)
{
    struct job *job = given;
    for (;;) {
        const int64_t part = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (part >= job->groups * job->slabs) return;
        if (job->is_double ? part_double(job, part) : part_float(job, part))
            __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    }
}

/* Do the job with the threads of an OpenMP library, whose GOMP_parallel is given. */
void work_together(struct job *job, void (*run)(void (*)(void *), void *, unsigned, unsigned),
                   int64_t threads)
{
    run(work, job, (unsigned)threads, 0);
}

#else /* ---------------------------------------------------- for each type of numbers */

#define LANES ((int)(WIDTH / sizeof(REAL)))
#define QUAD ((int)(16 / sizeof(REAL)))

typedef REAL NAME(vector) __attribute__((vector_size(WIDTH), aligned(sizeof(REAL)), may_alias));

INLINE NAME(vector) NAME(load)(const REAL *from) { return *(const NAME(vector) *)from; }
INLINE void NAME(store)(REAL *to, NAME(vector) value) { *(NAME(vector) *)to = value; }
INLINE NAME(vector) NAME(spread)(REAL value) { return value - (NAME(vector)){0}; }

/* What is worked on at a time: rows of the matrix, a block of its columns, a panel of the batch. */
struct NAME(tile) {
    const struct job *job;
    int64_t first, last;   /* rows */
    int64_t begin, end;    /* columns */
    int64_t offset, width; /* of the panel in the batch */
    const REAL *block;     /* the dense matrix from row begin, column offset */
    int64_t stride;        /* from one of its rows to the next */
    int32_t *at;           /* (last - first): the first entry of each row in the block */
    REAL *out;             /* of a sample: for the first entry of the matrix */
    int is_more;           /* of a sample: whether out holds dot products of other panels */
};

/* Add products with the entries in a tile to the output; W vectors are as wide as the panel. */
INLINE void NAME(multiply)(const int W, const struct NAME(tile) *tile)
{
    const struct job *job = tile->job;
    const REAL *values = job->values, *bias = job->left, *block = tile->block;
    const int32_t *columns = job->columns;
    const int64_t begin = tile->begin, end = tile->end, stride = tile->stride;
    const int is_whole = tile->width == W * LANES;
    int32_t past = 0;
    for (int64_t row = tile->first; row < tile->last; ++row) {
        REAL *out = (REAL *)job->out + row * job->batch + tile->offset;
        REAL spare[WIDEST * LANES];
        int32_t *at = tile->at + (row - tile->first), e = *at;
        const int32_t stop = job->starts[row + 1];
        NAME(vector) sums[WIDEST];
        if (row + 1 < tile->last) {
            fetch(columns + at[1], past * sizeof(int32_t));
            fetch(values + at[1], past * sizeof(REAL));
        }
        if (!begin) {
            const NAME(vector) start = NAME(spread)(bias ? bias[row] : 0);
            UNROLL
            for (int w = 0; w < W; ++w) sums[w] = start;
        } else {
            const REAL *from = is_whole ? out : memcpy(spare, out, tile->width * sizeof(REAL));
            UNROLL
            for (int w = 0; w < W; ++w) sums[w] = NAME(load)(from + w * LANES);
        }
        for (; e < stop && columns[e] < end; ++e) {
            const NAME(vector) value = NAME(spread)(values[e]);
            const REAL *x = block + (columns[e] - begin) * stride;
            UNROLL
            for (int w = 0; w < W; ++w) sums[w] += value * NAME(load)(x + w * LANES);
        }
        UNROLL
        for (int w = 0; w < W; ++w) NAME(store)((is_whole ? out : spare) + w * LANES, sums[w]);
        if (!is_whole) memcpy(out, spare, tile->width * sizeof(REAL));
        past = e - *at;
        *at = e;
    }
}

/* Products of W vectors, added up to 16 bytes. */
INLINE NAME(quad) NAME(dot)(const int W, const NAME(vector) *left, const REAL *x)
{
    typedef REAL half __attribute__((vector_size(WIDTH / 2)));
    union { NAME(vector) whole; half halves[2]; NAME(quad) quads[WIDTH / 16]; } folded;
    NAME(vector) sums[WIDEST];
    UNROLL
    for (int w = 0; w < W; ++w) sums[w] = left[w] * NAME(load)(x + w * LANES);
    UNROLL
    for (int n = W / 2; n; n /= 2)
        UNROLL
        for (int w = 0; w < n; ++w) sums[w] += sums[w + n];
    folded.whole = sums[0];
#if WIDTH > 32
    folded.halves[0] += folded.halves[1];
#endif
#if WIDTH > 16
    folded.quads[0] += folded.quads[1];
#endif
    return folded.quads[0];
}

/* Give or add dot products for the entries in a tile; W vectors are as wide as the panel. */
INLINE void NAME(sample)(const int W, const struct NAME(tile) *tile)
{
    const struct job *job = tile->job;
    const int32_t *columns = job->columns;
    const REAL *block = tile->block;
    const int64_t begin = tile->begin, end = tile->end, stride = tile->stride;
    const int is_more = tile->is_more;
    REAL *out = tile->out;
    int32_t past = 0;
    for (int64_t row = tile->first; row < tile->last; ++row) {
        const REAL *from = (const REAL *)job->left + row * job->batch + tile->offset;
        REAL spare[WIDEST * LANES] = {0};
        int32_t *at = tile->at + (row - tile->first), e = *at;
        const int32_t stop = job->starts[row + 1];
        NAME(vector) left[WIDEST];
        if (row + 1 < tile->last) {
            fetch(columns + at[1], past * sizeof(int32_t));
            fetch(out + at[1], past * sizeof(REAL));
        }
        if (tile->width < W * LANES) from = memcpy(spare, from, tile->width * sizeof(REAL));
        UNROLL
        for (int w = 0; w < W; ++w) left[w] = NAME(load)(from + w * LANES);
        for (; e <= stop - QUAD && columns[e + QUAD - 1] < end; e += QUAD) {
            NAME(quad) sums[QUAD];
            UNROLL
            for (int i = 0; i < QUAD; ++i)
                sums[i] = NAME(dot)(W, left, block + (columns[e + i] - begin) * stride);
            sums[0] = NAME(across)(sums);
            UNROLL
            for (int i = 0; i < QUAD; ++i) out[e + i] = sums[0][i] + (is_more ? out[e + i] : 0);
        }
        for (; e < stop && columns[e] < end; ++e) {
            NAME(quad) sums[QUAD] = {NAME(dot)(W, left, block + (columns[e] - begin) * stride)};
            sums[0] = NAME(across)(sums);
            out[e] = sums[0][0] + (is_more ? out[e] : 0);
        }
        past = e - *at;
        *at = e;
    }
}

INLINE void NAME(compute)(const int W, const struct NAME(tile) *tile)
{
    if (tile->job->is_sample) NAME(sample)(W, tile);
    else NAME(multiply)(W, tile);
}

/* Copy rows of which width numbers are wanted into a panel, zeros after them. */
static void NAME(pack)(REAL *to, int64_t step, const REAL *from, int64_t stride, int64_t rows,
                       int64_t width)
{
    for (int64_t row = 0; row < rows; ++row, to += step, from += stride) {
        memcpy(to, from, width * sizeof(REAL));
        if (width < step) memset(to + width, 0, (step - width) * sizeof(REAL));
    }
}

/* Do a part; returns whether memory ran out. */
static int NAME(part)(const struct job *job, int64_t part)
{
    const int64_t widest = WIDEST * LANES, panels = (job->batch + widest - 1) / widest;
    const int64_t group = part % job->groups, slab = part / job->groups;
    const int64_t from = slab * panels / job->slabs, to = (slab + 1) * panels / job->slabs;
    const int64_t bytes = bytes_of_block(), entries = job->starts[job->rows];
    struct NAME(tile) tile = {
        .job = job, .first = first_row(job, group), .last = first_row(job, group + 1)};
    const int64_t rows = tile.last - tile.first;
    const int64_t uses = (job->starts[tile.last] - job->starts[tile.first]) / job->inner;
    char *memory;
    REAL *packed;
    if (!rows) return 0;
    memory = malloc(bytes + 64 + rows * sizeof(int32_t));
    if (!memory) return 1;
    packed = (REAL *)(((uintptr_t)memory + 63) / 64 * 64);
    tile.at = (int32_t *)((char *)packed + bytes);
    tile.out = (REAL *)job->out + (job->is_sample ? slab * entries : 0);
    for (int64_t panel = from; panel < to; ++panel) {
        const int64_t offset = panel * widest, width = smaller(job->batch - offset, widest);
        const int64_t vectors = (width + LANES - 1) / LANES;
        const int64_t wide = vectors > 4 ? WIDEST : vectors > 2 ? 4 : vectors;
        const int64_t step = wide * LANES, height = bytes / (wide * WIDTH);
        const int packs = width < step || (job->batch > step && uses >= 4);
        tile.offset = offset;
        tile.width = width;
        tile.stride = packs ? step : job->batch;
        tile.is_more = panel > from;
        memcpy(tile.at, job->starts + tile.first, rows * sizeof(int32_t));
        for (tile.begin = 0; tile.begin < job->inner; tile.begin = tile.end) {
            tile.end = smaller(tile.begin + height, job->inner);
            tile.block = (const REAL *)job->dense + tile.begin * job->batch + offset;
            if (packs) {
                NAME(pack)(packed, step, tile.block, job->batch, tile.end - tile.begin, width);
                tile.block = packed;
            }
            if (wide == 1) NAME(compute)(1, &tile);
            else if (wide == 2) NAME(compute)(2, &tile);
            else if (wide == 4) NAME(compute)(4, &tile);
            else NAME(compute)(WIDEST, &tile);
        }
    }
    free(memory);
    return 0;
}

#undef LANES
#undef QUAD

#endif
