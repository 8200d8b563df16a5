// Reads, updates and writes memory once and does nothing else: what no operation on it can beat.
//
// Built by floor.py for the processor at hand. One call covers the elements [begin, end) of all rows, a chunk
// of each row in turn.
#include <stdint.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

typedef int64_t vec __attribute__((vector_size(64), aligned(4), may_alias));
enum { LINE = 64, STEP = 4 * LINE };

typedef struct {
  const char *const *reads;  // rows that are read
  long num_reads, read_size;  // and the bytes of one of their elements
  char *const *updates;  // float rows that are read and written
  long num_updates;
  char *const *writes;  // rows that are written
  long num_writes, write_size;
} Rows;

typedef struct {
  long chunk;  // elements of one row before the next row's turn
  int prefetch;  // fetch the row's next chunk meanwhile
  int streaming;  // write past the caches
} Variant;

static void read_piece(const char *p, long bytes, long ahead, vec *sums) {
  long i = 0;
  for (; i + STEP <= bytes; i += STEP) {
    for (int k = 0; k < 4; ++k) {
      if (ahead) __builtin_prefetch(p + i + ahead + k * LINE);
      sums[k] ^= *(const vec *)(p + i + k * LINE);
    }
  }
  for (; i < bytes; ++i) sums[0][0] ^= p[i];
}

// zero is 0, which the compiler cannot know.
static void update_piece(char *p, long bytes, int64_t zero) {
  long i = 0;
  for (; i + LINE <= bytes; i += LINE) *(vec *)(p + i) ^= zero;
  for (; i < bytes; ++i) p[i] ^= (char)zero;
}

static void write_piece(char *p, long bytes, int64_t zero, int streaming) {
  const vec value = {zero};
  long i = 0;
#ifdef __SSE2__
  if (streaming && (uintptr_t)p % 16 == 0) {
    for (; i + 16 <= bytes; i += 16) _mm_stream_si128((__m128i *)(p + i), _mm_set1_epi64x(zero));
  }
#endif
  for (; i + LINE <= bytes; i += LINE) *(vec *)(p + i) = value;
  for (; i < bytes; ++i) p[i] = (char)zero;
}

int64_t touch(const Rows *rows, const Variant *variant, long begin, long end, int64_t zero) {
  vec sums[4] = {{0}};
  for (long e = begin; e < end; e += variant->chunk) {
    const long count = end - e < variant->chunk ? end - e : variant->chunk;
    const long bytes = count * rows->read_size;
    for (long r = 0; r < rows->num_reads; ++r) {
      read_piece(rows->reads[r] + e * rows->read_size, bytes, variant->prefetch ? bytes : 0, sums);
    }
    for (long r = 0; r < rows->num_updates; ++r) update_piece(rows->updates[r] + e * 4, count * 4, zero);
    for (long r = 0; r < rows->num_writes; ++r) {
      write_piece(rows->writes[r] + e * rows->write_size, count * rows->write_size, zero, variant->streaming);
    }
  }
  const vec sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}
