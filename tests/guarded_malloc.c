/* Loaded before libc's malloc (LD_PRELOAD), this gives each tensor memory that ends at a page nobody may touch, is
   filled with 0xA5, and is never given out again: reading or writing past the end, or what was freed, is a signal.
   Tensors are what asks posix_memalign for an alignment of 64. More than MOST bytes at once are refused. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096ul
#define SPACE (1ul << 38)
#define MOST (1ul << 26)
#define FRESH 0xA5
#define FLAGS (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

static char *base, *end; /* of what is still free */
static size_t *sizes;    /* of each block, by the page that it starts in */

__attribute__((constructor)) static void reserve(void) {
  sizes = mmap(0, SPACE / PAGE * sizeof(size_t), PROT_READ | PROT_WRITE, FLAGS, -1, 0);
  char *space = mmap(0, SPACE, PROT_NONE, FLAGS, -1, 0);
  if (sizes == MAP_FAILED || space == MAP_FAILED) abort();
  end = space + PAGE;
  __atomic_store_n(&base, space, __ATOMIC_SEQ_CST);
}

static int is_ours(const void *block) {
  return base && (const char *)block >= base && (const char *)block < base + SPACE;
}

static size_t room_of(size_t size) { return (size + 63) & ~63ul; }
static size_t pages_of(size_t size) { return (room_of(size) + PAGE - 1) / PAGE * PAGE; }
static size_t *size_of(const void *block) { return &sizes[((const char *)block - base) / PAGE]; }

int posix_memalign(void **out, size_t alignment, size_t size) {
  static int (*next)(void **, size_t, size_t);
  if (!base || alignment != 64 || size == 0) {
    if (!next) next = dlsym(RTLD_NEXT, "posix_memalign");
    return next(out, alignment, size);
  }
  if (size > MOST) return ENOMEM;
  char *start = __atomic_fetch_add(&end, pages_of(size) + PAGE, __ATOMIC_SEQ_CST);
  if (start + pages_of(size) + PAGE > base + SPACE) abort();
  if (mprotect(start, pages_of(size), PROT_READ | PROT_WRITE)) return ENOMEM;
  char *block = start + pages_of(size) - room_of(size);
  memset(block, FRESH, room_of(size));
  *size_of(block) = size;
  *out = block;
  return 0;
}

void free(void *block) {
  static void (*next)(void *);
  if (!is_ours(block)) {
    if (!next) next = dlsym(RTLD_NEXT, "free");
    next(block);
    return;
  }
  size_t size = *size_of(block);
  for (size_t i = size; i < room_of(size); i++)
    if (((unsigned char *)block)[i] != FRESH) {
      fprintf(stderr, "written past the end of %zu bytes\n", size);
      abort();
    }
  mmap((char *)block + room_of(size) - pages_of(size), pages_of(size), PROT_NONE, FLAGS | MAP_FIXED, -1, 0);
}

void *realloc(void *block, size_t size) {
  static void *(*next)(void *, size_t);
  if (is_ours(block)) abort();
  if (!next) next = dlsym(RTLD_NEXT, "realloc");
  return next(block, size);
}

size_t malloc_usable_size(void *block) {
  static size_t (*next)(void *);
  if (is_ours(block)) return *size_of(block);
  if (!next) next = dlsym(RTLD_NEXT, "malloc_usable_size");
  return next(block);
}
