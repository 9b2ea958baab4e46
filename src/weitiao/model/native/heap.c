/* A heap of its own for large tensors. compiled.py builds this file, heap.py calls it.
 *
 * A heap that holds everything keeps small things that live long between large ones that do not, and a tensor of one row more fits none of
 * the holes that remain. Tensors by themselves come and go like a stack: here each takes the first hole that it fits, from the lowest address
 * on, and what was forward is free as a whole when it has gone back. Their memory is not given back before heap_trim is called.
 *
 * heap_use puts take and give where libc10, in which torch's tensors are made, calls posix_memalign and free; whoever else calls these gets
 * what the C library has.
 */

#define _GNU_SOURCE
#include <stddef.h>
#ifndef __linux__

int heap_use(size_t bytes, int huge) { return (void)bytes, (void)huge, 1; }
int heap_has(const void *data) { return (void)data, 0; }
void heap_trim(void) {}
void heap_used(size_t *now, size_t *most, size_t *reached) { *now = *most = *reached = 0; }

#else
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LEAST (1 << 16) /* bytes: what is smaller stays with the C library */
#define UNIT 64         /* bytes: of a vector; before each tensor stands where its block is */
#define PAGE 4096
#define HUGE_PAGE (1L << 21)

/* Bytes [at, at + size), by address between `before` and `after`; of free ones also between the free ones next to it. */
typedef struct block {
    char *at;
    size_t size;
    struct block *before, *after, *free_before, *free_after;
    int taken;
} block;

static char *region;
static size_t room, in_use, most_in_use, highest;
static block lowest; /* before all, of no size: the free ones begin behind it */
static block *spare;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static block *blank(void) {
    if (!spare) {
        block *some = malloc(256 * sizeof(block));
        if (!some) return NULL;
        for (int i = 0; i < 256; i++) some[i].after = spare, spare = some + i;
    }
    block *found = spare;
    spare = found->after;
    return found;
}

static void leave_free(block *b) {
    b->free_before->free_after = b->free_after;
    if (b->free_after) b->free_after->free_before = b->free_before;
}

static size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

static void *take(size_t size, size_t align) {
    char *data = NULL;
    pthread_mutex_lock(&lock);
    for (block *b = lowest.free_after; b; b = b->free_after) {
        char *first = (char *)rounded((size_t)b->at + UNIT, align);
        size_t wanted = first - b->at + rounded(size, UNIT);
        if (wanted > b->size) continue;
        if (b->size - wanted >= PAGE) { /* what is left stays free, in its place */
            block *rest = blank();
            if (!rest) break;
            *rest = (block){b->at + wanted, b->size - wanted, b, b->after, b->free_before, b->free_after, 0};
            if (b->after) b->after->before = rest;
            rest->free_before->free_after = rest;
            if (rest->free_after) rest->free_after->free_before = rest;
            b->after = rest;
            b->size = wanted;
        } else
            leave_free(b);
        b->taken = 1;
        in_use += b->size;
        if (in_use > most_in_use) most_in_use = in_use;
        if ((size_t)(b->at + b->size - region) > highest) highest = b->at + b->size - region;
        *(block **)(first - UNIT) = b;
        data = first;
        break;
    }
    pthread_mutex_unlock(&lock);
    return data;
}

static void swallow_next(block *b) {
    block *next = b->after;
    b->size += next->size;
    b->after = next->after;
    if (b->after) b->after->before = b;
    next->after = spare;
    spare = next;
}

static void give(char *data) {
    pthread_mutex_lock(&lock);
    block *b = *(block **)(data - UNIT), *near = b->before;
    b->taken = 0;
    in_use -= b->size;
    while (near->taken) near = near->before; /* the free one before it, or `lowest` */
    b->free_before = near;
    b->free_after = near->free_after;
    near->free_after = b;
    if (b->free_after) b->free_after->free_before = b;
    if (b->after && !b->after->taken) {
        leave_free(b->after);
        swallow_next(b);
    }
    if (b->before == near && near != &lowest) {
        leave_free(b);
        swallow_next(near);
    }
    pthread_mutex_unlock(&lock);
}

/* Does it lie here? */
int heap_has(const void *data) { return (uintptr_t)data - (uintptr_t)region < room; }

static int memalign_here(void **out, size_t align, size_t size) {
    if (size >= LEAST && align <= HUGE_PAGE && size < room && (*out = take(size, align > UNIT ? PAGE : UNIT))) return 0;
    return posix_memalign(out, align, size);
}

static void free_here(void *data) {
    if (heap_has(data))
        give(data);
    else
        free(data);
}

/* Give the pages of what is free back to the system. */
void heap_trim(void) {
    pthread_mutex_lock(&lock);
    for (block *b = lowest.free_after; b; b = b->free_after) {
        char *first = (char *)rounded((size_t)b->at, PAGE), *end = (char *)(((size_t)b->at + b->size) / PAGE * PAGE);
        if (end > first) madvise(first, end - first, MADV_DONTNEED);
    }
    pthread_mutex_unlock(&lock);
}

/* Bytes: taken now; at most since this was last asked; and up to where the highest block went since then. */
void heap_used(size_t *now, size_t *most, size_t *reached) {
    pthread_mutex_lock(&lock);
    *now = in_use, *most = most_in_use, *reached = highest;
    most_in_use = in_use, highest = 0;
    pthread_mutex_unlock(&lock);
}

static void hold(void) { pthread_mutex_lock(&lock); }
static void let_go(void) { pthread_mutex_unlock(&lock); }

static int put(void **slot, void *function, size_t page) {
    void *first = (void *)((size_t)slot / page * page);
    if (mprotect(first, page, PROT_READ | PROT_WRITE)) return 0; /* of the linker's tables some are read-only */
    *slot = function;
    return 1;
}

static int replace_in(struct dl_phdr_info *info, size_t size, void *done) {
    (void)size;
    const char *name = strrchr(info->dlpi_name, '/');
    if (!name || strncmp(name, "/libc10.so", 10)) return 0;
    const ElfW(Sym) *symbols = NULL;
    const char *names = NULL;
    const ElfW(Rela) *tables[2] = {NULL, NULL};
    size_t sizes[2] = {0, 0}, page = sysconf(_SC_PAGESIZE);
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_DYNAMIC)
            for (const ElfW(Dyn) *d = (void *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr); d->d_tag != DT_NULL; d++) {
                if (d->d_tag == DT_SYMTAB) symbols = (void *)d->d_un.d_ptr;
                if (d->d_tag == DT_STRTAB) names = (void *)d->d_un.d_ptr;
                if (d->d_tag == DT_JMPREL) tables[0] = (void *)d->d_un.d_ptr;
                if (d->d_tag == DT_PLTRELSZ) sizes[0] = d->d_un.d_val;
                if (d->d_tag == DT_RELA) tables[1] = (void *)d->d_un.d_ptr;
                if (d->d_tag == DT_RELASZ) sizes[1] = d->d_un.d_val;
            }
    if (!symbols || !names) return 1;
    for (int frees = 1; frees >= 0; frees--) /* all that can free them before any is made */
        for (int t = 0; t < 2; t++)
            for (size_t i = 0; tables[t] && i < sizes[t] / sizeof(ElfW(Rela)); i++) {
                const ElfW(Rela) *r = tables[t] + i;
                const char *symbol = names + symbols[ELF64_R_SYM(r->r_info)].st_name;
                if (strcmp(symbol, frees ? "free" : "posix_memalign")) continue;
                if (!put((void **)(info->dlpi_addr + r->r_offset), frees ? (void *)free_here : (void *)memalign_here, page)) return 1;
                *(int *)done |= frees ? 1 : 2;
            }
    return 1;
}

/* Reserve addresses of so many bytes, on huge pages or not, and take tensors there from now on. 0, or at which of its three parts it failed. */
int heap_use(size_t bytes, int huge) {
    room = rounded(bytes, HUGE_PAGE);
    void *all = mmap(NULL, room + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return room = 0, 1;
    region = (char *)rounded((size_t)all, HUGE_PAGE);
    if (huge) madvise(region, room, MADV_HUGEPAGE);
    block *whole = blank();
    if (!whole) return 2;
    lowest = (block){region, 0, NULL, whole, NULL, whole, 0};
    *whole = (block){region, room, &lowest, NULL, &lowest, NULL, 0};
    pthread_atfork(hold, let_go, let_go);
    int done = 0;
    dl_iterate_phdr(replace_in, &done);
    return done == 3 ? 0 : 3;
}

#endif
