/* A heap for torch's large tensors on a CPU. compiled.py builds this file, heap.py calls it.
 *
 *     capacity   | header, tensor, slack | free      | header, tensor | header, tensor | free ...        |
 *                 block                   block       block            block            block
 *
 * Blocks tile a region of addresses that is reserved once; no two free ones are neighbours, and the free list goes by address. A tensor takes the
 * first free block that it fits, from the lowest address on. Activations come and go like a stack, so that what a pass took is free as a whole when
 * it has gone back; in a heap that holds everything, small things that live longer keep it in pieces.
 *
 * heap_use puts `memalign_here` and `free_here` where libc10, in which torch's tensors are made, has its posix_memalign and free. All other
 * libraries keep theirs.
 */

#define _GNU_SOURCE
#include <stdlib.h>
#if !defined(__linux__) || !defined(__GLIBC__)
#error Tensors have a heap of their own under Linux with glibc alone.
#endif
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define UNIT 64 /* bytes of a vector, to which tensors are aligned, and of a header: where the block is */
#define HUGE_PAGE (1UL << 21)
#define GIVEN_BACK (1UL << 25) /* bytes of a tensor that goes back to the system when it is freed, as with glibc at most, unless `keeps` */

/* Bytes [at, at + size); before, after: its neighbours. free_before, free_after: of a free block, the next free ones. */
typedef struct block {
    char *at;
    size_t size;
    struct block *before, *after, *free_before, *free_after;
    int taken;
} block;

enum outcome { IN_PLACE, NO_ADDRESSES, NO_MEMORY, NOT_FOUND };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *region;
static size_t capacity, least, page, in_use, most_in_use, highest;
static int keeps, huge;
static block lowest; /* of no size, before all: the head of both lists */
static block *spare; /* descriptors that describe nothing, by `after` */

static size_t rounded_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static block *new_block(void) {
    if (!spare) {
        block *some = malloc(256 * sizeof(block));
        if (!some) return NULL;
        for (int i = 0; i < 256; i++) some[i].after = spare, spare = some + i;
    }
    block *found = spare;
    spare = found->after;
    return found;
}

static void link_free(block *b, block *before) {
    b->free_before = before;
    b->free_after = before->free_after;
    before->free_after = b;
    if (b->free_after) b->free_after->free_before = b;
}

static void unlink_free(block *b) {
    b->free_before->free_after = b->free_after;
    if (b->free_after) b->free_after->free_before = b->free_before;
}

/* Leave what is behind the first `size` bytes of a free block a free block of its own. */
static int split(block *b, size_t size) {
    block *rest = new_block();
    if (!rest) return 0;
    *rest = (block){.at = b->at + size, .size = b->size - size, .before = b, .after = b->after};
    if (b->after) b->after->before = rest;
    b->after = rest;
    b->size = size;
    link_free(rest, b);
    return 1;
}

/* Two free neighbours become one. */
static void coalesce_next(block *b) {
    block *next = b->after;
    unlink_free(next);
    b->size += next->size;
    b->after = next->after;
    if (b->after) b->after->before = b;
    next->after = spare;
    spare = next;
}

static void *allocate(size_t size, size_t align) {
    char *tensor = NULL;
    pthread_mutex_lock(&lock);
    for (block *b = lowest.free_after; b; b = b->free_after) {
        char *first = (char *)rounded_up((size_t)b->at + UNIT, align);
        size_t wanted = first - b->at + rounded_up(size, UNIT);
        if (wanted > b->size) continue;
        if (b->size - wanted > least && !split(b, wanted)) break; /* less than that nobody could take: it stays, as slack */
        unlink_free(b);
        b->taken = 1;
        in_use += b->size;
        if (in_use > most_in_use) most_in_use = in_use;
        if ((size_t)(b->at + b->size - region) > highest) highest = b->at + b->size - region;
        *(block **)(first - UNIT) = b;
        tensor = first;
        break;
    }
    pthread_mutex_unlock(&lock);
    return tensor;
}

static void give_back(char *first, char *end) {
    size_t whole = huge ? HUGE_PAGE : page; /* a huge page in part would cost its neighbours theirs */
    first = (char *)rounded_up((size_t)first, whole);
    end = (char *)((size_t)end / whole * whole);
    if (end > first) madvise(first, end - first, MADV_DONTNEED);
}

/* The free block before a taken one, `lowest` if there is none: by whichever side has a free one nearer. */
static block *free_block_before(block *b) {
    block *low = b->before, *high = b->after;
    while (low->taken) {
        if (high && !high->taken) return high->free_before;
        low = low->before;
        if (high) high = high->after;
    }
    return low;
}

static void deallocate(char *tensor) {
    pthread_mutex_lock(&lock);
    block *b = *(block **)(tensor - UNIT), *before = free_block_before(b);
    if (!keeps && b->size >= GIVEN_BACK) give_back(b->at, b->at + b->size);
    b->taken = 0;
    in_use -= b->size;
    link_free(b, before);
    if (b->after && !b->after->taken) coalesce_next(b);
    if (b->before == before && before != &lowest) coalesce_next(before);
    pthread_mutex_unlock(&lock);
}

/* Does it lie here? */
int heap_has(const void *data) { return (uintptr_t)data - (uintptr_t)region < capacity; }

static int memalign_here(void **out, size_t align, size_t size) {
    if (size >= least && size < capacity && align <= page && (*out = allocate(size, align > UNIT ? align : UNIT))) return 0;
    return posix_memalign(out, align, size);
}

static void free_here(void *data) {
    if (heap_has(data))
        deallocate(data);
    else
        free(data);
}

/* Give the memory of all free blocks back to the system. */
void heap_trim(void) {
    pthread_mutex_lock(&lock);
    for (block *b = lowest.free_after; b; b = b->free_after) give_back(b->at, b->at + b->size);
    pthread_mutex_unlock(&lock);
}

/* Keep the memory of what is freed for what comes next, or give large tensors' back. */
void heap_keep(int yes) {
    pthread_mutex_lock(&lock);
    keeps = yes;
    pthread_mutex_unlock(&lock);
}

/* Bytes: of taken blocks, now and at most since this was last asked; and the addresses that those reached up to, holes included. */
void heap_used(size_t *now, size_t *most, size_t *reached) {
    pthread_mutex_lock(&lock);
    *now = in_use, *most = most_in_use, *reached = highest;
    most_in_use = in_use, highest = 0;
    for (block *b = lowest.after; b; b = b->after)
        if (b->taken) highest = b->at + b->size - region;
    pthread_mutex_unlock(&lock);
}

static void lock_before_fork(void) { pthread_mutex_lock(&lock); }
static void unlock_after_fork(void) { pthread_mutex_unlock(&lock); }

/* Libc10 as it is loaded: its symbols, its tables of addresses to fill in, and which bytes the linker has made read-only since. */
struct tables {
    size_t base, read_only, read_only_size, sizes[2];
    const ElfW(Sym) *symbols;
    const char *names;
    const ElfW(Rela) *entries[2];
};

static int find_libc10(struct dl_phdr_info *info, size_t size, void *found) {
    (void)size;
    struct tables *t = found;
    const char *name = strrchr(info->dlpi_name, '/');
    if (!name || strncmp(name, "/libc10.so", 10)) return 0;
    t->base = info->dlpi_addr;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = info->dlpi_phdr + i;
        if (part->p_type == PT_GNU_RELRO) t->read_only = t->base + part->p_vaddr, t->read_only_size = part->p_memsz;
        if (part->p_type != PT_DYNAMIC) continue;
        for (const ElfW(Dyn) *d = (void *)(t->base + part->p_vaddr); d->d_tag != DT_NULL; d++) {
            if (d->d_tag == DT_SYMTAB) t->symbols = (void *)d->d_un.d_ptr;
            if (d->d_tag == DT_STRTAB) t->names = (void *)d->d_un.d_ptr;
            if (d->d_tag == DT_JMPREL) t->entries[0] = (void *)d->d_un.d_ptr;
            if (d->d_tag == DT_PLTRELSZ) t->sizes[0] = d->d_un.d_val;
            if (d->d_tag == DT_RELA) t->entries[1] = (void *)d->d_un.d_ptr;
            if (d->d_tag == DT_RELASZ) t->sizes[1] = d->d_un.d_val;
        }
    }
    return 1;
}

static int patch_slot(const struct tables *t, void **slot, void *function) {
    int closed = (size_t)slot - t->read_only < t->read_only_size;
    void *first = (void *)((size_t)slot / page * page);
    if (closed && mprotect(first, page, PROT_READ | PROT_WRITE)) return 0;
    *slot = function;
    if (closed) mprotect(first, page, PROT_READ);
    return 1;
}

/* Let libc10 call `function` where it called `symbol`: in how many places. */
static int patch_libc10(const struct tables *t, const char *symbol, void *function) {
    int count = 0;
    for (int i = 0; i < 2; i++)
        for (size_t j = 0; t->entries[i] && j < t->sizes[i] / sizeof(ElfW(Rela)); j++) {
            const ElfW(Rela) *entry = t->entries[i] + j;
            if (strcmp(t->names + t->symbols[ELF64_R_SYM(entry->r_info)].st_name, symbol)) continue;
            if (!patch_slot(t, (void **)(t->base + entry->r_offset), function)) return 0;
            count++;
        }
    return count;
}

/* Reserve addresses of so many bytes, and take tensors of `smallest` bytes and more there from now on, on huge pages or not. */
enum outcome heap_use(size_t bytes, size_t smallest, int on_huge_pages) {
    pthread_mutex_lock(&lock);
    enum outcome found = IN_PLACE;
    struct tables t = {0};
    void *all = NULL;
    block *whole = NULL;
    if (region) goto done;
    page = sysconf(_SC_PAGESIZE), least = smallest, huge = on_huge_pages;
    dl_iterate_phdr(find_libc10, &t);
    found = NOT_FOUND;
    if (!t.symbols || !t.names) goto done;
    found = NO_MEMORY;
    if (!(whole = new_block())) goto done;
    found = NO_ADDRESSES;
    bytes = rounded_up(bytes, HUGE_PAGE);
    all = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) goto done;
    region = (char *)rounded_up((size_t)all, HUGE_PAGE);
    capacity = bytes;
    if (huge) madvise(region, capacity, MADV_HUGEPAGE);
    lowest = (block){.at = region, .after = whole, .free_after = whole};
    *whole = (block){.at = region, .size = capacity, .before = &lowest, .free_before = &lowest};
    pthread_atfork(lock_before_fork, unlock_after_fork, unlock_after_fork);
    found = NOT_FOUND; /* whoever frees has to know of them before the first is made */
    if (patch_libc10(&t, "free", free_here) && patch_libc10(&t, "posix_memalign", memalign_here)) found = IN_PLACE;
done:
    pthread_mutex_unlock(&lock);
    return found;
}
