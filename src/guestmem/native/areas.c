/* The ranges of this process that the server must hear about: mappings of guest_memfds; and what mbind() was told. A set for each kind, since they overlap; sorted, without overlaps in it, neighbours merged.
 * Signals are blocked while the lock is held, so that a handler cannot wait for its own thread. */
#define _GNU_SOURCE
#include "shim.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

struct area {
    uintptr_t start, end;
};

struct set {
    struct area *areas;
    size_t count, capacity;
};

enum { SETS = 2 };

static struct set sets[SETS];                   /* of AREA_GMEM, AREA_BOUND */
static uintptr_t lowest = UINTPTR_MAX, highest; /* bounds of all areas ever: most ranges are outside */
static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;

static size_t set_count(int i)
{
    return __atomic_load_n(&sets[i].count, __ATOMIC_ACQUIRE);
}

bool areas_exist(void)
{
    return set_count(0);
}

static struct set *set_of(enum area_kind kind)
{
    return &sets[__builtin_ctz(kind)];
}

/* The index of the first area that ends after `start`. */
static size_t first_after(const struct set *set, uintptr_t start)
{
    size_t low = 0, high = set->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (set->areas[middle].end <= start)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Saturates: the callers' arguments are not checked yet. */
static uintptr_t range_end(const void *address, size_t length)
{
    uintptr_t end = (uintptr_t)address + length;
    if (end < (uintptr_t)address || end > UINTPTR_MAX - 4095)
        return UINTPTR_MAX & ~(uintptr_t)4095;
    return (end + 4095) & ~(uintptr_t)4095;
}

bool areas_touch(const void *address, size_t length, enum area_kind kinds)
{
    uintptr_t start = (uintptr_t)address, end = range_end(address, length);
    if (!areas_exist() || end <= __atomic_load_n(&lowest, __ATOMIC_RELAXED) ||
        start >= __atomic_load_n(&highest, __ATOMIC_RELAXED))
        return false;
    bool found = false;
    kernel_sigset old = signals_block();
    pthread_rwlock_rdlock(&lock);
    for (int i = 0; i < SETS; i++) {
        size_t at = first_after(&sets[i], start);
        found |= (kinds >> i & 1) && at < sets[i].count && sets[i].areas[at].start < end;
    }
    pthread_rwlock_unlock(&lock);
    signals_restore(old);
    return found;
}

static bool grow(struct set *set)
{
    size_t wanted = set->capacity ? set->capacity * 2 : 256, size = wanted * sizeof(struct area);
    long place = sys(SYS_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (is_error(place))
        return false;
    if (set->areas) {
        memcpy((void *)place, set->areas, set->count * sizeof(struct area));
        sys(SYS_munmap, set->areas, set->capacity * sizeof(struct area));
    }
    set->areas = (struct area *)place;
    set->capacity = wanted;
    return true;
}

static void insert(struct set *set, size_t at, struct area area)
{
    if (set->count == set->capacity && !grow(set))
        return; /* a client without memory for 16 bytes has other troubles */
    memmove(&set->areas[at + 1], &set->areas[at], (set->count - at) * sizeof(area));
    set->areas[at] = area;
    __atomic_store_n(&set->count, set->count + 1, __ATOMIC_RELEASE);
}

static void delete(struct set *set, size_t at)
{
    memmove(&set->areas[at], &set->areas[at + 1], (set->count - at - 1) * sizeof(struct area));
    __atomic_store_n(&set->count, set->count - 1, __ATOMIC_RELEASE);
}

static void cut(struct set *set, uintptr_t start, uintptr_t end)
{
    size_t at = first_after(set, start);
    while (at < set->count && set->areas[at].start < end) {
        struct area area = set->areas[at];
        delete(set, at);
        if (area.start < start)
            insert(set, at++, (struct area){area.start, start});
        if (area.end > end)
            insert(set, at++, (struct area){end, area.end});
    }
}

static void merge_with_next(struct set *set, size_t at)
{
    if (at + 1 >= set->count || set->areas[at].end != set->areas[at + 1].start)
        return;
    set->areas[at].end = set->areas[at + 1].end;
    delete(set, at + 1);
}

static void widen_bounds(struct area area)
{
    if (area.start < lowest)
        __atomic_store_n(&lowest, area.start, __ATOMIC_RELAXED);
    if (area.end > highest)
        __atomic_store_n(&highest, area.end, __ATOMIC_RELAXED);
}

void areas_add(const void *address, size_t length, enum area_kind kind)
{
    struct set *set = set_of(kind);
    struct area area = {(uintptr_t)address, range_end(address, length)};
    kernel_sigset old = signals_block();
    pthread_rwlock_wrlock(&lock);
    cut(set, area.start, area.end);
    size_t at = first_after(set, area.start);
    insert(set, at, area);
    merge_with_next(set, at);
    if (at)
        merge_with_next(set, at - 1);
    widen_bounds(area);
    pthread_rwlock_unlock(&lock);
    signals_restore(old);
}

void areas_remove(const void *address, size_t length, enum area_kind kinds)
{
    if (!areas_exist())
        return;
    kernel_sigset old = signals_block();
    pthread_rwlock_wrlock(&lock);
    for (int i = 0; i < SETS; i++)
        if (kinds >> i & 1)
            cut(&sets[i], (uintptr_t)address, range_end(address, length));
    pthread_rwlock_unlock(&lock);
    signals_restore(old);
}

void areas_lock(void)
{
    pthread_rwlock_wrlock(&lock);
}

void areas_unlock(void)
{
    pthread_rwlock_unlock(&lock);
}

/* The child is another thread than the one that locked, so it starts with a lock of its own. */
void areas_after_fork(void)
{
    lock = (pthread_rwlock_t)PTHREAD_RWLOCK_INITIALIZER;
}
